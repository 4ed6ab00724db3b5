"""LoRA files that a command line names: on disk, or on the Hub."""

from __future__ import annotations

import re
from pathlib import Path


WEIGHT_NAME = "pytorch_lora_weights.safetensors"
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def locate_lora(source: str, weight_name: str | None = None) -> Path:
    """The file of a LoRA, downloaded where `source` is neither a file nor a folder.

    Args:
        source: a file, a folder, or `"user/name"`.
        weight_name: of the file in the folder or repository; diffusers' own name when `None`.

    Raises:
        ValueError: no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    from diffusers_ext.core.checkpoint_folder import refuse_checkpoint
    from diffusers_ext.core.hub_connection import not_found

    refuse_checkpoint(source)
    name = weight_name or WEIGHT_NAME
    if Path(source).is_file():
        return Path(source)
    if Path(source).is_dir():
        path = Path(source, name)
        if not path.is_file():
            raise ValueError(f"{source} must hold {name}, got none. Name it with `--weight_name`.")
        return path
    if not _REPOSITORY.fullmatch(source) or source.endswith(".safetensors"):
        # Asking the Hub for a mistyped path would take long and say something else.
        raise ValueError(
            f"A LoRA must be a file, a folder or 'user/name', got {source}: no such file."
        )
    try:
        return Path(hf_hub_download(source, name))
    except RemoteEntryNotFoundError as error:
        raise ValueError(
            f"Repository {source} must hold {name}, got none. Name it with `--weight_name`."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(not_found("lora", source, f"a LoRA with {name}", error)) from error
