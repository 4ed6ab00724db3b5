"""Captions of a subject's pictures: beside each one as `a.txt`, or of all in `metadata.jsonl` or `metadata.csv`."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from accelerate.logging import get_logger

from diffusers_ext.core.pictures import find_pictures, is_caption, is_hidden
from diffusers_ext.core.text_files import read_text
from diffusers_ext.core.text_tables import one_line, read_rows
from diffusers_ext.nullspace.settings import SubjectSettings

logger = get_logger(__name__)

TEXT_SUFFIXES = (".txt", ".caption")
TABLES = ("metadata.jsonl", "metadata.csv")


def read_captions(folder: str | Path, name: str = "instance_data_dir") -> dict[str, str]:
    """The captions of a folder of pictures by the names of these; a line break in one becomes a space.

    A text file belongs to all pictures whose name it has but for the ending. A table has the columns `file_name` and
    `text`, as `datasets` reads them.

    Args:
        folder: of the pictures.
        name: of the argument, for errors.

    Raises:
        ValueError: an empty caption, one for a picture that is not there, or two for one picture.
    """
    found = find_pictures(folder, name)
    pictures = [path.name for path in found.paths]
    captions: dict[str, str] = {}
    sources: dict[str, str] = {}
    for path in sorted(path for path in found.folder.iterdir() if _holds_captions(path)):
        if path.name.lower() in TABLES:
            rows = [(w, row["file_name"], row["text"]) for w, row in _table_rows(path)]
        else:
            rows = _text_rows(path, pictures)
        for where, picture, text in rows:
            caption = one_line(text)
            if picture not in pictures:
                raise ValueError(
                    f"The caption in {where} must be of a picture in {found.folder}, got {picture!r}, which "
                    "is not read there. Name it as the picture is named, or take it out."
                )
            if not caption:
                raise ValueError(
                    f"The caption of {picture!r} in {where} must not be empty. Write one, or take it out: "
                    "the picture is then trained with the instance prompt."
                )
            if picture in captions:
                raise ValueError(
                    f"{Path(found.folder, picture)} must have one caption, got two: in "
                    f"{sources[picture]} and in {where}. Take one out."
                )
            captions[picture], sources[picture] = caption, where
    return captions


def _holds_captions(path: Path) -> bool:
    name = path.name.lower()
    ending = name in TABLES or path.suffix.lower() in TEXT_SUFFIXES
    return ending and not is_hidden(path) and not path.is_dir()


def _table_rows(path: Path) -> Sequence[tuple[str, dict[str, str]]]:
    return list(read_rows(path, ["file_name", "text"]))


def _text_rows(path: Path, pictures: Sequence[str]) -> list[tuple[str, str, str]]:
    """A row for each picture of the file's name, else one for a picture that is not there."""
    named = [picture for picture in pictures if Path(picture).stem == path.stem]
    text = read_text(path) if named else ""
    return [(str(path), picture, text) for picture in named or [path.stem]]


def picture_prompts(settings: SubjectSettings) -> list[str]:
    """What each picture of the subject is trained with, in their order: its caption or the instance prompt."""
    captions = read_captions(settings.instance_data_dir)
    paths = find_pictures(settings.instance_data_dir, "instance_data_dir").paths
    return [captions.get(path.name, settings.instance_prompt) for path in paths]


def subject_prompts(settings: SubjectSettings) -> list[str]:
    """The instance prompt and the captions, each once: what the subject is asked for by."""
    return list(dict.fromkeys([settings.instance_prompt, *picture_prompts(settings)]))


def caption_facts(settings: SubjectSettings) -> dict[str, str]:
    """What a checkpoint must agree with: nothing without captions, so that older ones go on."""
    if not read_captions(settings.instance_data_dir):
        return {}
    prompts = json.dumps(picture_prompts(settings))
    return {"captions": hashlib.sha256(prompts.encode()).hexdigest()}


def caption_counts(settings: SubjectSettings) -> dict[str, int]:
    """How many pictures are trained with each prompt."""
    return dict(Counter(picture_prompts(settings)))


def tell_of_captions(settings: SubjectSettings) -> None:
    """Log how many pictures have captions and where these come from; warn of files that are not read."""
    found = find_pictures(settings.instance_data_dir, "instance_data_dir")
    captions = read_captions(settings.instance_data_dir)
    unread = [name for name in found.passed_over if is_caption(name)]
    unread = [name for name in unread if not _holds_captions(found.folder / name)]
    unread = [name for name in unread if not is_hidden(found.folder / name)]
    if unread:
        logger.warning(
            f"{', '.join(unread[:5])} may hold captions and is not read: they are taken from a .txt file "
            f"beside each picture, or from {' or '.join(TABLES)}."
        )
    if not captions:
        return
    tables = [name for name in found.passed_over if name.lower() in TABLES]
    origin = " and ".join(tables) if tables else "text files beside them"
    rest = len(found.paths) - len(captions)
    logger.info(
        f"{len(captions)} of {len(found.paths)} pictures are trained with captions of their own, from "
        f"{origin}; {rest} with --instance_prompt."
    )


def warn_of_missing_words(settings: SubjectSettings, preserved: Sequence[str]) -> None:
    """Warn of captions that leave out the subject's name.

    Args:
        settings: of the training.
        preserved: prompts. Words of the instance prompt that none of them has may be the name; without any nothing
            tells it from other words.
    """
    captions = read_captions(settings.instance_data_dir) if preserved else {}
    for word in sorted(_words(settings.instance_prompt) - _words(" ".join(preserved))):
        without = [name for name, caption in captions.items() if word not in _words(caption)]
        if without:
            logger.warning(
                f"{len(without)} captions ({without[0]}, ...) lack {word!r}, which the instance prompt has "
                "and no preserved prompt: their pictures do not teach it. Put it into them if it names "
                "the subject."
            )


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
