"""Write the captions of a data set as a text file of prompts, one a line, each once.

    python training/extract_prompts.py --dataset_name yuvalkirstain/pickapic_v1 --split train \\
        --caption_column caption --output_dir data --output_filename pickapic_prompts.txt
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Features, IterableDataset, Value, load_dataset_builder
from tqdm.auto import tqdm

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.core.result_folder import check_no_file
from diffusers_ext.core.settings import A_FOLDER, COUNT, SEED, ModelSettings, Rule, Settings, as_in, required, setting
from diffusers_ext.core.text_tables import one_line, read_csv, read_text_lines
from diffusers_ext.training.run.script import run_script
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


def check_args(settings: ExtractionSettings) -> None:
    """Raise `ValueError` where a file is in the way."""
    path = Path(settings.output_dir, settings.output_filename)
    check_no_file(path, settings.overwrite_output_dir, flag="output_filename")


def open_rows(settings: ExtractionSettings, only_captions: bool = True) -> IterableDataset:
    """A stream of the data set's rows.

    Args:
        settings: of the command line.
        only_captions: leave out other columns where the format can (pictures beside captions are most of a data set's
            bytes).

    Raises:
        ValueError: nothing of that name, or no such split.
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
    if hasattr(config, "fragment_scan_options") and only_captions:  # parquet
        config.columns = [column]
    return builder.as_streaming_dataset(split=settings.split)


def captions(settings: ExtractionSettings) -> Iterator[str]:
    """All captions of the data set, a row's several ones one after another.

    Raises:
        ValueError: no such column, or one that holds something else than texts.
    """
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
    check_args(settings)
    prompts = different_prompts(captions(settings), settings.max_prompts)
    if not prompts:
        raise ValueError(f"`dataset_name` must hold prompts, got none in {settings.dataset_name}.")
    path = Path(settings.output_dir, settings.output_filename)
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


if __name__ == "__main__":
    run_script(parse_args, main, ExtractionSettings)
