"""Sets of noise pairs: source noise from a seed, golden noise as its difference, read lazily."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import safe_open
from torch.utils.data import Dataset

from diffusers_ext.core.artifacts import CONFIG_NAME
from diffusers_ext.core.tensor_files import check_config_digest, check_format_version
from diffusers_ext.core.text_files import read_json
from diffusers_ext.golden_noise.pairs.hub import download_pairs, push_pairs
from diffusers_ext.golden_noise.pairs.shards import (
    TENSOR,
    PairRecord,
    check_shard,
    list_shards,
    open_tensors,
    shard_files,
)
from diffusers_ext.golden_noise.pairs.third_party import ThirdPartyPairDataset, is_third_party


logger = logging.getLogger(__name__)

CLASS_NAME, FORMAT_VERSION = "PairDataset", 1


class PairItem(TypedDict):
    """What an index of a dataset gives."""

    noise: torch.Tensor  # (channels, height, width) float32
    golden: torch.Tensor  # (steps, channels, height, width) float32
    prompt: str


def source_noise(seed: int, latent_shape: Sequence[int]) -> torch.Tensor:
    """The noise that a seed stands for: `(channels, height, width)` float32, on any machine alike."""
    return torch.randn(tuple(latent_shape), generator=torch.Generator().manual_seed(seed))


class PairDataset(Dataset):
    """A native folder of pairs; memory-mapped, and picklable for the workers of a `DataLoader`.

    A shard holds `golden - noise` in float16 for every step of the sequence (one step: pairs); the
    noise itself is drawn from its seed. The tables also load with
    `datasets.load_dataset(folder, "pairs")` and `"rejected"`.

    Attributes:
        records: seeds, rewards and noise statistics, one per item.
        complete: whether the generation has ended.
    """

    def __init__(self, folder: str | os.PathLike, verify: bool = True) -> None:
        """Check and index a folder.

        Args:
            folder: as `PairWriter` leaves it.
            verify: compare the SHA-256 of every file, which reads them once.

        Raises:
            ValueError: no pairs there, or a file is missing, truncated or altered.
        """
        self.folder = Path(folder)
        config = read_config(folder)
        self.num_steps: int = config["num_steps"]
        self.latent_shape: tuple[int, ...] = tuple(config["latent_shape"])
        self.facts: dict[str, Any] | None = config["facts"]
        self.records: list[PairRecord] = []
        self._places: list[tuple[int, int]] = []  # (shard, row)
        shards = list_shards(folder)
        for shard in shards:
            rows = check_shard(folder, shard, (self.num_steps, *self.latent_shape), verify)
            self.records += rows
            self._places += [(shard, row) for row in range(len(rows))]
        self.complete = len(shards) == config["num_shards"]
        self.prompts = [record.prompt for record in self.records]
        self._handles: dict[int, safe_open] = {}
        if not self.records:
            raise ValueError(
                f"{folder} must hold at least one pair, got none in {len(shards)} finished shards."
            )
        if not self.complete:
            logger.warning(
                f"{folder} holds {len(shards)} of {config['num_shards']} shards: its generation has "
                "not ended."
            )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> PairItem:
        shard, row = self._places[index]
        if shard not in self._handles:
            self._handles[shard] = open_tensors(shard_files(self.folder, shard).tensors)
        delta = self._handles[shard].get_slice(TENSOR)[row : row + 1][0]
        noise = source_noise(self.records[index].seed, self.latent_shape)
        return {"noise": noise, "golden": noise + delta.float(), "prompt": self.prompts[index]}

    def push_to_hub(self, repo_id: str, **arguments: Any) -> str:
        """Upload as a repository of data with a card, in one commit.

        `datasets.load_dataset(repo_id, "pairs")` and `"rejected"` then read the tables without this
        package, `open_pairs(repo_id)` all of it.

        Args:
            repo_id: `"user/name"`, made when absent.
            arguments: facts for the card that go before what the set knows of itself (`base_model`,
                `trained_on`, `license`, `pipeline`, `reward`, `results`, `settings`),
                `allow_unfinished` for a set whose generation has not ended, and `private`, `token`,
                `revision`, `create_pr`, `commit_message`, `subfolder`.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            ValueError: an unfinished set, or a fact that is neither given nor known; nothing is
                uploaded then.
        """
        return push_pairs(self, repo_id, **arguments)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}  # a worker maps the files for itself


def open_pairs(
    path: str | os.PathLike,
    *,
    verify: bool = True,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> PairDataset | ThirdPartyPairDataset:
    """A set of noise pairs or sequences in any of the formats that are known.

    Native folders; the official folder of `<index>_<seed>.npz` with its JSONL of scores
    (https://github.com/xie-lab-ml/Golden-Noise-for-Diffusion-Models); folders of `.pt` files with a
    `metadata.csv`, pairs or sequences. Nothing in them is executed.

    Args:
        path: a local folder, or `"user/name"` of a repository of data on the Hub.
        verify: compare checksums, where the format has them.
        revision, subfolder: of the repository; `subfolder` also of a local folder.
        cache_dir, token, local_files_only, force_download: of the download.

    Raises:
        ValueError: nothing of that name, an unknown or broken set, or no pair in it.
    """
    if Path(path).is_dir():
        folder = Path(path, subfolder or "")
    else:
        folder = download_pairs(
            path,
            revision=revision,
            subfolder=subfolder,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    return ThirdPartyPairDataset(folder) if is_third_party(folder) else PairDataset(folder, verify)


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The config of a native folder; raises `ValueError` where there is none of this format."""
    path = Path(folder, CONFIG_NAME)
    if not path.is_file():
        raise ValueError(
            f"{folder} must be a folder of noise pairs, got none of config.json, metadata.csv and "
            "*.npz in it."
        )
    config = read_json(path)
    if config.get("_class_name") != CLASS_NAME:
        raise ValueError(f"{path} must describe a {CLASS_NAME}, got {config.get('_class_name')!r}.")
    check_config_digest(config, path)
    check_format_version(config, path, FORMAT_VERSION)
    # What reading the set relies on.
    shape = config.get("latent_shape")
    numbers = {name: config.get(name) for name in ("num_steps", "num_shards")}
    sizes = dict(enumerate(shape if isinstance(shape, list) and len(shape) == 3 else [None]))
    numbers |= {f"latent_shape[{index}]": size for index, size in sizes.items()}
    for name, value in numbers.items():
        least = 0 if name == "num_shards" else 1
        if type(value) is not int or not least <= value < 2**31:
            raise ValueError(f"`{name}` must be a number from {least}, got {value!r} in {path}.")
    if not isinstance(config.get("facts", False), (dict, type(None))):
        raise ValueError(
            f"`facts` must be an object or null, got {config.get('facts')!r} in {path}."
        )
    return config
