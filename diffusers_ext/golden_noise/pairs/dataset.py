"""Sets of noise pairs: source noise from a seed, golden noise as its difference, read lazily."""

from __future__ import annotations

import logging
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch.utils.data import Dataset

from diffusers_ext.core.sources import hub_names
from diffusers_ext.core.tensor_files import check_regular_file, read_pickled_tensors
from diffusers_ext.core.text_files import parse_json, read_csv, read_text_lines
from diffusers_ext.golden_noise.card import pair_set_card
from diffusers_ext.golden_noise.pairs.shards import (
    TENSOR,
    PairRecord,
    check_shard,
    list_shards,
    measured,
    num_rejected,
    open_deltas,
    read_config,
    shard_files,
)
from diffusers_ext.golden_noise.pairs.verified import VerifiedFiles
from diffusers_ext.hub.push import push_folder, split_arguments

logger = logging.getLogger(__name__)

METADATA_CSV = "metadata.csv"
_CSV_COLUMNS = {
    "target_noise_file": ("prompt", "source_noise_file", "target_noise_file"),
    "golden_sequence_file": ("prompt", "source_noise_file", "golden_sequence_file"),
}
# Parts of an unfinished shard, and files that a killed run left half written.
_NOT_SHARED = ("progress/*", ".*", "*/.*")
_NATIVE = ("config.json", "report.json", "deltas/*", "pairs/*", "rejected/*", "shards/*")
_SHARDS = tuple(f"{folder}/[0-9][0-9][0-9][0-9][0-9].*" for folder in ("deltas", "pairs", "rejected", "shards"))
_THIRD_PARTY = (METADATA_CSV, "*.pt", "*.npz", "*.json", "*.jsonl")


class _Entry(NamedTuple):
    prompt: str
    source: Path
    golden: Path


class ThirdPartyPairDataset(Dataset):
    """The official `.npz` pairs, or the `.pt` pairs and sequences of a `metadata.csv`.

    Of official pairs those are kept whose first optimized score is above the first original score, as their own
    training does; without a file of scores there are no captions, so it must be there. Items are as in `PairDataset`,
    one file read at a time.
    """

    facts: dict[str, Any] | None = None  # such sets say nothing about how they were made

    def __init__(self, folder: str | os.PathLike) -> None:
        """Index a folder and read its first item; raises `ValueError` where it is broken or empty."""
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
    if not rows:
        raise ValueError(f"{path} must hold at least one pair, got none.")
    kind = next((column for column in _CSV_COLUMNS if column in rows[0]), None)
    if kind is None:
        raise ValueError(f"{path} must have the columns of {list(_CSV_COLUMNS.values())}, got {list(rows[0])}.")
    root, entries = Path(os.path.abspath(folder)), []
    for number, row in enumerate(rows, 1):
        files = [folder / (row[column] or "") for column in ("source_noise_file", kind)]
        for file in files:
            # By the names: in the cache of the Hub every file is a link to elsewhere.
            if not file.is_file() or root not in Path(os.path.abspath(file)).parents:
                raise ValueError(f"Row {number} of {path} must name files below {folder}, got {file}.")
        entries.append(_Entry(row["prompt"], *files))
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


def source_noise(seed: int, latent_shape: Sequence[int]) -> torch.Tensor:
    """The noise that a seed stands for: `(channels, height, width)` float32, on any machine alike."""
    return torch.randn(tuple(latent_shape), generator=torch.Generator().manual_seed(seed))


class PairDataset(Dataset):
    """A native folder of pairs; memory-mapped, and picklable for the workers of a `DataLoader`.

    A shard holds `golden - noise` in float16 for every step of the sequence (one step: pairs); the noise itself is
    drawn from its seed. The tables also load with `datasets.load_dataset(folder, "pairs")` and `"rejected"`; `records`
    are the rows of the first, and `complete` tells whether the generation has ended.
    """

    def __init__(self, folder: str | os.PathLike, verify: bool = True) -> None:
        """Check and index what `PairWriter` wrote; `verify` compares SHA-256, of files as `VerifiedFiles` knows them.

        Raises `ValueError` where there are no pairs, or a file is missing, truncated or altered.
        """
        self.folder = Path(folder)
        config = read_config(folder)
        self.num_steps: int = config["num_steps"]
        self.latent_shape: tuple[int, ...] = tuple(config["latent_shape"])
        self.facts: dict[str, Any] | None = config["facts"]
        self.records: list[PairRecord] = []
        self._places: list[tuple[int, int]] = []  # (shard, row)
        shards = list_shards(folder)
        verified = VerifiedFiles(folder) if verify else None
        for shard in shards:
            rows = check_shard(folder, shard, (self.num_steps, *self.latent_shape), verified)
            self.records += rows
            self._places += [(shard, row) for row in range(len(rows))]
        if verified is not None:
            verified.save()
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

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`noise` `(channels, height, width)`, `golden` `(steps, channels, height, width)`, float32, and `prompt`."""
        shard, row = self._places[index]
        if shard not in self._handles:
            self._handles[shard] = open_deltas(shard_files(self.folder, shard).tensors)
        delta = self._handles[shard].get_slice(TENSOR)[row : row + 1][0]
        noise = source_noise(self.records[index].seed, self.latent_shape)
        return {"noise": noise, "golden": noise + delta.float(), "prompt": self.prompts[index]}

    def push_to_hub(self, repo_id: str, *, allow_unfinished: bool = False, **arguments: Any) -> str:
        """Upload as a repository of data with a card, in one commit, whose address comes back.

        `datasets.load_dataset(repo_id, "pairs")` and `"rejected"` then read the tables without this package,
        `open_pairs(repo_id)` all of it.

        Args:
            allow_unfinished: also a set whose generation has not ended.
            arguments: facts for the card that go before what the set knows of itself (`base_model`, `trained_on`,
                `license`, `pipeline`, `reward`, `results`, `settings`), and `private`, `token`, `revision`,
                `create_pr`, `commit_message`, `subfolder`.

        Raises:
            ValueError: an unfinished set, or a fact that is neither given nor known; nothing is uploaded then.
        """
        if not self.complete and not allow_unfinished:
            raise ValueError(
                f"{self.folder} must hold all of its shards to be shared, got "
                f"{len(list_shards(self.folder))}: its generation has not ended. Continue it by "
                "`generate_npd.py --resume_from_checkpoint latest`, or pass `allow_unfinished=True`."
            )
        hub, facts = split_arguments(arguments)
        if facts.get("results") is None:
            facts["results"] = measured(self.folder)
        card = pair_set_card(
            self.facts,
            num_pairs=len(self),
            num_rejected=num_rejected(self.folder),
            num_steps=self.num_steps,
            latent_shape=self.latent_shape,
            token=hub.get("token"),
            **facts,
        )
        return push_folder(
            self.folder,
            repo_id,
            card,
            repo_type="dataset",
            ignore_patterns=_NOT_SHARED,
            delete_patterns=_SHARDS,  # of a set with more of them that was there before
            **hub,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}  # a worker maps the files for itself


def download_pairs(
    name: str | os.PathLike,
    *,
    argument: str = "path",
    revision: str | None = None,
    subfolder: str | None = None,
    **download_arguments: Any,
) -> Path:
    """The folder of a set from the Hub, whole; raises `ValueError` where it is not to be had."""
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    offline = download_arguments.get("local_files_only", False)
    with hub_names(argument, name, "noise pairs", revision=revision, local_files_only=offline):
        snapshot = snapshot_download(
            str(name),
            repo_type="dataset",
            revision=revision,
            allow_patterns=[prefix + pattern for pattern in (*_NATIVE, *_THIRD_PARTY)],
            **download_arguments,
        )
    return Path(snapshot, prefix)


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
        path: a local folder, or `"user/name"` of a repository of data on the Hub; `subfolder` is of either.
        verify: compare checksums, where the format has them; of files that have not changed since, only once
            (`VerifiedFiles`).

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
    if (folder / METADATA_CSV).is_file() or _npz_files(folder):
        return ThirdPartyPairDataset(folder)
    return PairDataset(folder, verify)
