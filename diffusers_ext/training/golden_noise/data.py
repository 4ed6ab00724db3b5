"""The prompts of a data set as a text file; noise pairs and sequences of such prompts as samples of a training."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Features, IterableDataset, Value, load_dataset_builder
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.core.result_folder import check_no_file
from diffusers_ext.core.settings import A_FOLDER, COUNT, SEED, ModelSettings, Rule, Settings, as_in, required, setting
from diffusers_ext.core.text_files import one_line, read_csv, read_text_lines
from diffusers_ext.golden_noise.noise_statistics import match_energy
from diffusers_ext.golden_noise.pairs.dataset import download_pairs, open_pairs
from diffusers_ext.training.golden_noise.settings import NoiseSettings
from diffusers_ext.training.run.settings import parse_settings

logger = logging.getLogger(__name__)

# What a file of these endings is to `datasets`.
_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(kw_only=True)
class ExtractionSettings(Settings):
    """Which captions go to which file."""

    dataset_name: str = required("Hub name, folder, or csv, tsv, json, jsonl, parquet or txt file")
    dataset_config_name: str | None = setting(None, "of a Hub data set that has several")
    split: str = setting("train", "of a Hub data set or folder")
    caption_column: str = setting("caption", "not read for txt files")
    output_dir: str = required("folder of the prompts file", rule=A_FOLDER)
    overwrite_output_dir: bool = as_in(ModelSettings, "overwrite_output_dir", default=False)
    traceback: bool = as_in(ModelSettings, "traceback", default=False)
    output_filename: str = setting(
        "prompts.txt",
        "name of the prompts file",
        rule=Rule("the name of a file in `output_dir`", lambda value: value == Path(value).name),
    )
    max_prompts: int | None = setting(None, "different ones; all without it", rule=COUNT)
    shuffle: bool = setting(False, "by --seed")
    seed: int = setting(0, "of the shuffling", rule=SEED)
    shuffle_buffer_size: int = setting(10_000, "rows to choose the next one from", rule=COUNT)
    revision: str | None = setting(None, "revision of the data set on the Hub")
    cache_dir: str | None = setting(None, "of downloads")


def parse_args(input_args: Sequence[str] | None = None) -> ExtractionSettings:
    """Command line of this script."""
    return parse_settings(ExtractionSettings, __doc__, input_args)


def open_rows(settings: ExtractionSettings, only_captions: bool = True) -> IterableDataset:
    """A stream of the data set's rows.

    `only_captions` leaves out other columns where the format can: pictures are most of a data set's bytes.
    """
    path, column = Path(settings.dataset_name), settings.caption_column
    texts = sorted(path.glob("*.txt")) if path.is_dir() else []
    if (path.is_file() or texts) and settings.split != "train":
        raise ValueError(
            f"`split` must be 'train' for files, which have no others, got {settings.split!r} for {path}."
        )
    if path.suffix.lower() in (".csv", ".tsv", ".txt") and path.is_file():
        return _stream_files([path], column)
    if texts:
        return _stream_files(texts, column)
    source: dict[str, Any] = {"path": settings.dataset_name, "name": settings.dataset_config_name}
    if path.suffix.lower() in _FORMATS and path.is_file():
        source = {"path": _FORMATS[path.suffix.lower()], "data_files": str(path)}
    try:
        builder = load_dataset_builder(**source, cache_dir=settings.cache_dir, revision=settings.revision)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"`dataset_name` must be a data set on the Hub, a folder or a file, got {settings.dataset_name!r}: {error}"
        ) from error
    config = builder.config
    if hasattr(config, "converters"):  # csv: a number, `NA` or `None` is a text like any other
        config.converters, config.na_filter = {column: str}, False
    if isinstance(config, ParquetConfig) and only_captions:
        config.columns = [column]
    return builder.as_streaming_dataset(split=settings.split)


def captions(settings: ExtractionSettings) -> Iterator[str]:
    """All captions of the data set, a row's several ones one after another."""
    rows = open_rows(settings)
    if rows.column_names is not None and settings.caption_column not in rows.column_names:
        raise _no_such_column(settings, open_rows(settings, only_captions=False).column_names)
    if settings.shuffle:
        rows = rows.shuffle(seed=settings.seed, buffer_size=settings.shuffle_buffer_size)
    missing = 0
    for row in rows:
        if settings.caption_column not in row:
            raise _no_such_column(settings, row)
        value = row[settings.caption_column]
        for caption in value if isinstance(value, list) else [value]:
            if caption is None:
                missing += 1
            elif isinstance(caption, str):
                yield caption
            else:
                raise ValueError(
                    f"`caption_column` must hold texts, got {caption!r} in "
                    f"{settings.caption_column!r} of {settings.dataset_name}."
                )
    if missing:
        logger.warning(f"{missing} rows of {settings.dataset_name} have no caption.")


def different_prompts(texts: Iterable[str], max_prompts: int | None) -> list[str]:
    """The prompts in their first order, each once and on one line, with a progress bar."""
    found: dict[str, None] = {}
    with tqdm(total=max_prompts, desc="prompts") as bar:
        for text in texts:
            prompt = one_line(text)
            if prompt and prompt not in found:
                found[prompt] = None
                bar.update()
                if len(found) == max_prompts:
                    break
    return list(found)


def main(settings: ExtractionSettings) -> Path:
    """Extract; returns the file that was written."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.INFO)
    path = Path(settings.output_dir, settings.output_filename)
    check_no_file(path, settings.overwrite_output_dir, flag="output_filename")
    prompts = different_prompts(captions(settings), settings.max_prompts)
    if not prompts:
        raise ValueError(f"`dataset_name` must hold prompts, got none in {settings.dataset_name}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(prompts) + "\n")
    logger.info(f"Wrote {len(prompts)} prompts to {path}")
    return path


def _no_such_column(settings: ExtractionSettings, names: Iterable[str]) -> ValueError:
    return ValueError(
        f"`caption_column` must be a column of {settings.dataset_name}, got {settings.caption_column!r}. "
        f"There are {sorted(names)}."
    )


def _stream_files(paths: list[Path], column: str) -> IterableDataset:
    features = Features({column: Value("string")})
    rows = partial(_file_rows, [str(path) for path in paths], column)
    return IterableDataset.from_generator(rows, features=features)


def _file_rows(paths: list[str], column: str) -> Iterator[dict[str, str]]:
    for path in paths:
        if path.lower().endswith(".txt"):
            yield from ({column: line} for line in read_text_lines(path))
        else:
            yield from ({column: row[column]} for _, row in read_csv(path, [column]))


class WithoutPromptMeans(Dataset):
    """Pairs, as of `open_pairs`, whose golden noise lacks a share, in (0, 1], of the mean change of their prompt.

    With `d` the change of one noise and `m` the mean change of the prompt's other noises, golden noise is `noise + d -
    share m`, brought back to its energy. The mean is the same picture for every seed; it is most of what five repeats
    of the step add, and what makes their pictures alike.
    """

    def __init__(self, pairs: Dataset, share: float) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"`remove_prompt_mean` must be in (0, 1], got {share}.")
        self.counts = Counter(pairs.prompts)
        alone = [prompt for prompt, count in self.counts.items() if count < 2]
        if alone:
            raise ValueError(
                "`remove_prompt_mean` must have several noises of every prompt to average over, "
                f"got one of {alone[0]!r} and {len(alone) - 1} others. Make pairs with "
                "`generate_npd.py --noises_per_prompt`, unfiltered, or leave it out."
            )
        self.pairs, self.share = pairs, share
        self.prompts, self.num_steps = pairs.prompts, pairs.num_steps
        self.latent_shape, self.facts = pairs.latent_shape, pairs.facts
        self.sums = self._sum_changes()

    def _sum_changes(self) -> dict[str, torch.Tensor]:
        shape = (self.num_steps, *self.latent_shape)
        sums = {prompt: torch.zeros(shape) for prompt in self.counts}
        size = len(sums) * torch.Size(shape).numel() * 4
        logger.info(f"Mean changes of {len(sums)} prompts take {size / 2**30:.2f} GiB.")
        for index in tqdm(range(len(self.pairs)), desc="prompt means"):
            item = self.pairs[index]
            sums[item["prompt"]] += item["golden"] - item["noise"]
        return sums

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.pairs[index]
        change = item["golden"] - item["noise"]
        others = (self.sums[item["prompt"]] - change) / (self.counts[item["prompt"]] - 1)
        noise = item["noise"].expand_as(change)
        golden = match_energy(noise + change - self.share * others, noise)
        return {**item, "golden": golden}


class PromptSplit(NamedTuple):
    """Indices of samples; no prompt is on both sides."""

    train: list[int]
    validation: list[int]


def split_by_prompt(prompts: Sequence[str], share: float, seed: int) -> PromptSplit:
    """Hold out all samples of a share of the different prompts, at least of one; 0 holds out none.

    Whether a prompt is held out depends on the set of prompts and the seed, not on their order.
    """
    if not 0 <= share < 1:
        raise ValueError(f"`validation_split` must be in [0, 1), got {share}.")
    unique = sorted(set(prompts))
    count = max(1, round(share * len(unique))) if share else 0
    if count >= len(unique):
        raise ValueError(
            f"`validation_split` must leave prompts to train on, got {share} of {len(unique)} "
            "different prompts. Use more prompts, or 0."
        )
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {unique[index] for index in order[:count]}
    split = PromptSplit([], [])
    for index, prompt in enumerate(prompts):
        (split.validation if prompt in held_out else split.train).append(index)
    return split


class NoiseSamples(Dataset):
    """Samples of a data set of pairs, with the row of their prompt in a text cache in place of the prompt.

    Args:
        pairs: items `{"noise": (channels, height, width), "golden": (steps, channels, height, width), "prompt": str}`.
        steps: which golden states a sample has, counted from 1.
    """

    def __init__(
        self, pairs: Dataset, indices: Sequence[int], text_rows: dict[str, int], steps: Sequence[int]
    ) -> None:
        self.pairs, self.indices, self.text_rows = pairs, list(indices), text_rows
        self.steps = [step - 1 for step in steps]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.indices[position]
        item = self.pairs[index]
        golden = item["golden"][self.steps]
        if not (item["noise"].isfinite().all() and golden.isfinite().all()):
            raise ValueError(
                f"Sample {index} ({item['prompt']!r}) must be finite, got NaN or infinite numbers. "
                "Take it out of the data."
            )
        return {"noise": item["noise"].float(), "golden": golden.float(), "text": self.text_rows[item["prompt"]]}


def read_pairs(settings: NoiseSettings, verify: bool = True) -> Dataset:
    """The data of `--dataset_dir`; raises `ValueError` where it contradicts the command line."""
    folder = Path(settings.dataset_dir)
    if not folder.is_dir():
        folder = download_pairs(
            settings.dataset_dir, argument="dataset_dir", revision=settings.dataset_revision, token=settings.hub_token
        )
    pairs = open_pairs(folder, verify=verify)
    if len(pairs) == 0:
        raise ValueError(f"`dataset_dir` must hold pairs, got none in {settings.dataset_dir}.")
    if settings.remove_prompt_mean:
        pairs = WithoutPromptMeans(pairs, settings.remove_prompt_mean)
    _, height, width = pairs.latent_shape
    wanted = settings.noise_resolution
    if wanted is not None and (height, width) != (wanted, wanted):
        raise ValueError(f"`noise_resolution` must be that of the data, {height} x {width}, got {wanted}.")
    return pairs


def target_steps(settings: NoiseSettings, num_steps: int) -> list[int]:
    """The one step of pair trainers, from 1: `--target_step`, by default the last."""
    step = num_steps if settings.target_step == "last" else settings.target_step
    if not str(step).isdecimal() or not 1 <= int(step) <= num_steps:
        raise ValueError(f"`target_step` must be 'last' or from 1 to the data's {num_steps}, got {step}.")
    return [int(step)]


def sequence_steps(settings: NoiseSettings, num_steps: int) -> list[int]:
    """The steps of sequence trainers, from 1, cut to `--max_seq_len` states with the first noise."""
    if num_steps < 2:
        raise ValueError(
            "`dataset_dir` must hold sequences of at least 2 steps, got pairs of one. Make "
            "sequences with `generate_npd.py --num_steps`, or train a network of pairs with "
            "`train_npnet.py`."
        )
    longest = settings.max_seq_len or num_steps + 1
    if not 3 <= longest <= num_steps + 1:
        raise ValueError(
            f"`max_seq_len` must be from 3 to {num_steps + 1}, the data's {num_steps} steps and "
            f"the first noise, got {longest}."
        )
    return list(range(1, longest))


def count_steps(settings: NoiseSettings, samples: int, num_processes: int) -> int:
    """Optimizer steps of the run: `--max_train_steps`, or those of `--num_epochs`."""
    if settings.max_train_steps is not None:
        return settings.max_train_steps
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * num_processes
    return math.ceil(samples * settings.num_epochs / batch)


def data_facts(pairs: Dataset, split: PromptSplit, steps: Sequence[int]) -> dict[str, Any]:
    """What tells one training's data from another's, as JSON."""
    probe = pairs[0]["golden"].double()
    return {
        "samples": len(pairs),
        "prompts": hashlib.sha256("\n".join(pairs.prompts).encode()).hexdigest(),
        "first_sample": [probe.sum().item(), probe.square().sum().item()],
        "latent_shape": list(pairs.latent_shape),
        "steps": list(steps),
        "removed_prompt_mean": getattr(pairs, "share", 0.0),
        "training_samples": len(split.train),
        "validation_samples": len(split.validation),
        "generation": pairs.facts,
    }
