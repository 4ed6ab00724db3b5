"""Sets of noise pairs: source noise from a seed, golden noise as its difference, read lazily."""

from __future__ import annotations

import logging
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import Dataset

from diffusers_ext.core.artifacts import CONFIG_NAME
from diffusers_ext.core.tensor_files import (
    check_config_digest,
    check_format_version,
    check_regular_file,
    read_pickled_tensors,
)
from diffusers_ext.core.text_files import parse_json, read_csv, read_json, read_text_lines
from diffusers_ext.golden_noise.pairs.hub import download_pairs, push_pairs
from diffusers_ext.golden_noise.pairs.shards import (
    TENSOR,
    PairRecord,
    check_shard,
    list_shards,
    open_tensors,
    shard_files,
)

METADATA_CSV = "metadata.csv"
_CSV_COLUMNS = {
    "target_noise_file": ("prompt", "source_noise_file", "target_noise_file"),
    "golden_sequence_file": ("prompt", "source_noise_file", "golden_sequence_file"),
}


class _Entry(NamedTuple):
    prompt: str
    source: Path
    golden: Path


def is_third_party(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a `metadata.csv` or official `.npz` files."""
    return Path(folder, METADATA_CSV).is_file() or any(_npz_files(Path(folder)))


class ThirdPartyPairDataset(Dataset):
    """The official `.npz` pairs, or the `.pt` pairs and sequences of a `metadata.csv`.

    Of official pairs those are kept whose first optimized score is above the first original score, as their own
    training does; without a file of scores there are no captions, so it must be there. Items are as in `PairDataset`,
    one file read at a time.

    Attributes:
        facts: `None`: such sets say nothing about how they were made.
    """

    facts: dict[str, Any] | None = None

    def __init__(self, folder: str | os.PathLike) -> None:
        """Index a folder and read its first item.

        Raises:
            ValueError: an incomplete or broken folder, or no pair in it.
        """
        folder = Path(folder)
        self._read: Callable[[_Entry], tuple[torch.Tensor, torch.Tensor]]
        if (folder / METADATA_CSV).is_file():
            self._entries, self._read = _csv_entries(folder), _read_pt
        else:
            self._entries, self._read = _npz_entries(folder), _read_npz
        self.prompts = [entry.prompt for entry in self._entries]
        noise, golden = self._read(self._entries[0])
        self.latent_shape, self.num_steps = tuple(noise.shape), len(golden)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self._entries[index]
        noise, golden = self._read(entry)
        expected = (self.num_steps, *self.latent_shape)
        if tuple(golden.shape) != expected or noise.shape != golden.shape[1:]:
            raise ValueError(
                f"{entry.golden} must hold noises of shape {expected} like the first item, got "
                f"{tuple(golden.shape)} for a source of {tuple(noise.shape)}."
            )
        if not (torch.isfinite(noise).all() and torch.isfinite(golden).all()):
            raise ValueError(f"{entry.golden} must hold finite noises, got NaN or infinity.")
        return {"noise": noise, "golden": golden, "prompt": entry.prompt}


def _npz_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.npz")) or sorted(folder.glob("*/*.npz"))


def _npz_entries(folder: Path) -> list[_Entry]:
    """Official pairs that their scores let pass, in order of index."""
    tables = sorted({*folder.glob("*.json"), *folder.glob("*.jsonl")})
    if len(tables) != 1:
        raise ValueError(
            f"{folder} must hold one .json or .jsonl file with captions and scores beside its .npz "
            f"files, got {[path.name for path in tables]}."
        )
    files = {path.name: path for path in _npz_files(folder)}
    entries = []
    for number, line in enumerate(read_text_lines(tables[0]), 1):
        if line.strip():
            row = _score_row(tables[0], number, line)
            if row["optimized_score_list"][0] <= row["original_score_list"][0]:
                continue
            name = f"{row['index']}_{row['seed']}.npz"
            if name not in files:
                raise ValueError(f"{folder} must hold {name} of line {number}, got no such file.")
            entries.append(_Entry(row["caption"], files[name], files[name]))
    if not entries:
        raise ValueError(f"{tables[0]} must hold a pair whose score rises, got none.")
    return entries


def _score_row(path: Path, number: int, line: str) -> dict[str, Any]:
    row = parse_json(line, f"Line {number} of {path}")
    needed = {"index", "seed", "caption", "original_score_list", "optimized_score_list"}
    missing = sorted(needed - row.keys())
    if missing:
        raise ValueError(f"Line {number} of {path} must hold {missing}, got {line[:80]!r}.")
    scores = [row["original_score_list"][:1], row["optimized_score_list"][:1]]
    if any(len(s) != 1 or not math.isfinite(s[0]) for s in scores):
        raise ValueError(f"Line {number} of {path} must hold finite scores, got {scores}.")
    return row


def _csv_entries(folder: Path) -> list[_Entry]:
    """The rows of a `metadata.csv`, whose files must be below its folder."""
    path = folder / METADATA_CSV
    rows = [row for _, row in read_csv(path, ["prompt", "source_noise_file"])]
    names = list(rows[0]) if rows else []
    kind = next((column for column in _CSV_COLUMNS if column in names), None)
    if rows and kind is None:
        raise ValueError(f"{path} must have the columns of {list(_CSV_COLUMNS.values())}, got {names}.")
    root, entries = Path(os.path.abspath(folder)), []
    for number, row in enumerate(rows, 1):
        files = [folder / (row[column] or "") for column in ("source_noise_file", kind)]
        for file in files:
            # By the names: in the cache of the Hub every file is a link to elsewhere.
            if not file.is_file() or root not in Path(os.path.abspath(file)).parents:
                raise ValueError(f"Row {number} of {path} must name files below {folder}, got {file}.")
        entries.append(_Entry(row["prompt"], *files))
    if not entries:
        raise ValueError(f"{path} must hold at least one pair, got none.")
    return entries


def _read_npz(entry: _Entry) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        check_regular_file(entry.source)
        with open(entry.source, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            noise, golden = arrays["arr_0"], arrays["arr_1"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{entry.source} must hold the arrays arr_0 and arr_1, got: {error}.") from error
    return _single(entry.source, torch.from_numpy(noise)), _single(entry.golden, torch.from_numpy(golden))[None]


def _read_pt(entry: _Entry) -> tuple[torch.Tensor, torch.Tensor]:
    noise, golden = (read_pickled_tensors(path) for path in (entry.source, entry.golden))
    states = golden if isinstance(golden, (list, tuple)) else [golden]
    if not states:
        raise ValueError(f"{entry.golden} must hold at least one noise, got none.")
    stacked = torch.stack([_single(entry.golden, state) for state in states])
    return _single(entry.source, noise), stacked


def _single(path: Path, noise: Any) -> torch.Tensor:
    """One noise `(channels, height, width)` float32, with or without a batch of one before it."""
    if not isinstance(noise, torch.Tensor) or not noise.is_floating_point():
        raise ValueError(f"{path} must hold noise tensors, got {type(noise).__name__}.")
    if noise.ndim == 4 and len(noise) == 1:
        noise = noise[0]
    if noise.ndim != 3:
        raise ValueError(f"{path} must hold noises of shape (1, channels, height, width), got {tuple(noise.shape)}.")
    return noise.float()


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

    A shard holds `golden - noise` in float16 for every step of the sequence (one step: pairs); the noise itself is
    drawn from its seed. The tables also load with `datasets.load_dataset(folder, "pairs")` and `"rejected"`.

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
            raise ValueError(f"{folder} must hold at least one pair, got none in {len(shards)} finished shards.")
        if not self.complete:
            logger.warning(
                f"{folder} holds {len(shards)} of {config['num_shards']} shards: its generation has not ended."
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

        `datasets.load_dataset(repo_id, "pairs")` and `"rejected"` then read the tables without this package,
        `open_pairs(repo_id)` all of it.

        Args:
            repo_id: `"user/name"`, made when absent.
            arguments: facts for the card that go before what the set knows of itself (`base_model`, `trained_on`,
                `license`, `pipeline`, `reward`, `results`, `settings`), `allow_unfinished` for a set whose generation
                has not ended, and `private`, `token`, `revision`, `create_pr`, `commit_message`, `subfolder`.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            ValueError: an unfinished set, or a fact that is neither given nor known; nothing is uploaded then.
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
    (https://github.com/xie-lab-ml/Golden-Noise-for-Diffusion-Models); folders of `.pt` files with a `metadata.csv`,
    pairs or sequences. Nothing in them is executed.

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
            f"{folder} must be a folder of noise pairs, got none of config.json, metadata.csv and *.npz in it."
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
        raise ValueError(f"`facts` must be an object or null, got {config.get('facts')!r} in {path}.")
    return config
