"""What users name by a folder, a file or a name on the Hub, and errors that say what is wrong with it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from diffusers_ext.core.settings import check_keywords
from diffusers_ext.hub.connection import RemoteEntryNotFoundError, unreachable


def not_found(argument: str, source: str | os.PathLike, kind: str, error: BaseException) -> str:
    """One line for what neither a folder nor the Hub has given."""
    reason = unreachable(error)
    wanted = f"`{argument}` must be a folder or Hub name of {kind}, got {source}"
    if Path(source).exists() or reason is None:
        return f"{wanted}: {' '.join(str(error).split())}"
    return (
        f"{wanted}: no such folder, and the Hub cannot be asked: {reason}. Check the connection, give "
        "a folder, or download it where there is a network: what is in the cache needs none."
    )


_NAME = re.compile(r"checkpoint-\d+")
_FILES = ("run.json", "trained_0.safetensors")


def refuse_checkpoint(source: str | os.PathLike) -> None:
    """Raise `ValueError` for a checkpoint, a file of one, or a folder of nothing but checkpoints.

    A checkpoint holds some weights under the names of the model that trains, and nothing to load them by.
    """
    path = Path(source)
    for folder in (path, path.parent) if path.is_file() else (path,):
        if is_checkpoint(folder):
            raise ValueError(
                f"{path} must be a result, got a checkpoint of a training, from which it can go on. Use "
                f"{folder.parent}, where the training writes its result at the end; to finish it, run its "
                f"command again with `--resume_from_checkpoint {folder.name}`."
            )
    if not path.is_dir():
        return
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    checkpoints = [entry for entry in entries if is_checkpoint(entry)]
    if checkpoints and not any(entry.is_file() for entry in entries):
        raise ValueError(
            f"{path} must hold a result, got a training that has not finished: {len(checkpoints)} "
            "checkpoints and no result. Run its command again with `--resume_from_checkpoint latest`."
        )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is what the training scripts call a checkpoint, under whatever name."""
    if all((folder / name).is_file() for name in _FILES):
        return True
    # Of a training that was stopped while it wrote, or that was copied in part.
    named = _NAME.fullmatch(folder.name) is not None
    return named and any((folder / name).is_file() for name in _FILES)


CONFIG_NAME = "config.json"
LORA_WEIGHT_NAME = "pytorch_lora_weights.safetensors"
DOWNLOAD_ARGUMENTS = (
    "revision", "cache_dir", "token", "local_files_only", "force_download",
    "endpoint", "etag_timeout", "headers", "library_name", "library_version", "user_agent",
)  # fmt: skip
_ARGUMENT = "pretrained_model_name_or_path"
_NO_FOLDER = "`{}` must be a folder or 'user/name', got {}: no such folder."
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def check_download_arguments(arguments: Mapping[str, Any], function: str) -> None:
    """Raise `TypeError` where a keyword is none of a download, whether or not one takes place."""
    takes = f"of a download it takes {', '.join(DOWNLOAD_ARGUMENTS[:5])}"
    check_keywords(arguments, DOWNLOAD_ARGUMENTS, function, takes)


@contextmanager
def files_on_hub(
    source: str | os.PathLike, kind: str, *, no_file: str, no_folder: str | None = None, argument: str = _ARGUMENT
) -> Iterator[None]:
    """Say in the user's words what a download of `kind` lacks; no repository or revision stays the Hub's error.

    `no_file` is for a repository without the file, `no_folder` for what cannot be the name of one.
    """
    try:
        yield
    except HFValidationError as error:
        raise ValueError(no_folder or _NO_FOLDER.format(argument, source)) from error
    except LocalEntryNotFoundError as error:
        raise LocalEntryNotFoundError(not_found(argument, source, kind, error)) from error
    except RemoteEntryNotFoundError as error:
        raise ValueError(no_file) from error


@contextmanager
def hub_names(
    argument: str, source: str | os.PathLike, kind: str, *, revision: str | None = None, local_files_only: bool = False
) -> Iterator[None]:
    """As `files_on_hub`, and `ValueError` for a repository or revision that is not there, too."""
    wanted = f"`{argument}` must be a folder or Hub name of {kind}, got {source}"
    no_file = f"{wanted}: there is no {CONFIG_NAME} in it."
    no_folder = f"{wanted}: no such folder."
    try:
        with files_on_hub(source, kind, no_file=no_file, no_folder=no_folder, argument=argument):
            yield
    except RevisionNotFoundError as error:
        raise ValueError(f"`revision` must be a branch, tag or commit of {source}, got {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{wanted}: no such folder, and no such repository for this login. A private or gated one needs `token`."
        ) from error
    except LocalEntryNotFoundError as error:
        if not local_files_only:
            raise
        raise ValueError(
            f"{wanted}: with `local_files_only` it must have been downloaded whole before. Call it once without."
        ) from error


def artifact_file(
    source: str | os.PathLike, name: str, subfolder: str | None, download_arguments: Mapping[str, Any]
) -> Path:
    """Path of one file of an artifact, downloaded where `source` is no folder; `ValueError` where there is none."""
    if Path(source).is_dir():
        folder = Path(source, subfolder or "")
        refuse_checkpoint(folder)
        if not (folder / name).is_file():
            held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
            raise ValueError(f"{folder} must hold {name}, got {held}.")
        return folder / name
    if "/" not in str(source):  # nothing that the Hub could have: a slip, not a lost connection
        raise ValueError(_NO_FOLDER.format(_ARGUMENT, source))
    no_file = f"Repository {source} must hold {name}, got none."
    with files_on_hub(source, f"an artifact with {name}", no_file=no_file):
        return Path(hf_hub_download(str(source), name, subfolder=subfolder, **download_arguments))


def lora_file(source: str, weight_name: str | None = None) -> Path:
    """The file of a LoRA that a command line names by file, folder or `"user/name"`; `ValueError` where there is none.

    `weight_name` is that of the file in the folder or repository; diffusers' own name when `None`.
    """
    refuse_checkpoint(source)
    name = weight_name or LORA_WEIGHT_NAME
    if Path(source).is_file():
        return Path(source)
    if Path(source).is_dir():
        path = Path(source, name)
        if not path.is_file():
            raise ValueError(f"{source} must hold {name}, got none. Name it with `--weight_name`.")
        return path
    if not _REPOSITORY.fullmatch(source) or source.endswith(".safetensors"):
        # Asking the Hub for a mistyped path would take long and say something else.
        raise ValueError(f"A LoRA must be a file, a folder or 'user/name', got {source}: no such file.")
    no_file = f"Repository {source} must hold {name}, got none. Name it with `--weight_name`."
    with files_on_hub(source, f"a LoRA with {name}", no_file=no_file, argument="lora"):
        return Path(hf_hub_download(source, name))
