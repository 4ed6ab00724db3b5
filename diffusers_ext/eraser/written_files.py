"""The files of an eraser to be written, in PEFT's format or legacy, after the checks they must pass."""

from __future__ import annotations

import copy
import io
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.core.checked_tensors import with_digest
from diffusers_ext.core.config_digest import CONFIG_KEY
from diffusers_ext.core.safetensors_header import with_sorted_metadata
from diffusers_ext.eraser.config import EraserConfig
from diffusers_ext.eraser.convert import (
    LEGACY_TYPE,
    PEFT_PREFIX,
    StateDict,
    eraser_shape,
    to_legacy,
)
from diffusers_ext.eraser.eraser_files import FORMATS, eraser_config_digest
from diffusers_ext.families.cogvideox import CogVideoX
from diffusers_ext.families.family import import_class


def check_eraser_folder(folder: Path, format: str) -> None:
    """Raise `ValueError` for a format or folder that nothing can be written in."""
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {tuple(FORMATS)}, got {format!r}.")
    if folder.is_file():
        raise ValueError(f"`save_directory` must be a folder, got the file {folder}.")
    for other, names in FORMATS.items():
        if other != format and any((folder / name).exists() for name in names):
            raise ValueError(
                f"`save_directory` must not hold an eraser of another format, got {folder} with one "
                f"of format {other!r}. Choose another folder."
            )


def check_eraser_tensors(tensors: StateDict, name: str, dtype: torch.dtype | None = None) -> None:
    """Raise `ValueError` unless tensors, as they are to be written, are the eraser `name` with an effect.

    `dtype`, that they were brought to, is for the error: a narrow one may overflow, or leave nothing.
    """
    eraser_shape(tensors, f"The eraser {name!r}" + (f" in {dtype}" if dtype else ""))
    if not any(tensor.any() for key, tensor in tensors.items() if "eraser_up" in key):
        raise ValueError(
            f"A saved eraser must have an effect, got {name!r} with zero in every "
            "`eraser_up`. Train it first."
        )


def described(config: EraserConfig, **given: str | None) -> EraserConfig:
    """A copy of a config, with what is given in the place of what it says."""
    config = copy.copy(config)
    for name, value in given.items():
        setattr(config, name, value or getattr(config, name))
    return config


def eraser_contents(
    format: str,
    config: EraserConfig,
    tensors: StateDict,
    num_layers: int,
    model_class: type[torch.nn.Module] | None = None,
) -> dict[str, bytes]:
    """`{file name: content}` of an eraser, weights first.

    `model_class` is what `AutoPeftModel` loads, CogVideoX's when `None`.
    """
    if format == "legacy":
        return _legacy_files(tensors, num_layers)
    config.inference_mode = True
    model_class = model_class or import_class(CogVideoX.denoiser_class)
    facts = config.to_dict()
    facts["auto_mapping"] = {
        "base_model_class": model_class.__name__,
        "parent_library": model_class.__module__,
    }
    facts = {name: sorted(v) if isinstance(v, set) else v for name, v in facts.items()}
    weights = {PEFT_PREFIX + name: tensor for name, tensor in tensors.items()}
    content = (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode()
    metadata = {"format": "pt", CONFIG_KEY: eraser_config_digest(json.loads(content))}
    config_name, weights_name = FORMATS["peft"]
    return {
        weights_name: with_sorted_metadata(save(weights, metadata=with_digest(weights, metadata))),
        config_name: content,
    }


def _legacy_files(tensors: StateDict, num_layers: int) -> dict[str, bytes]:
    facts = {"eraser_type": LEGACY_TYPE, "eraser_rank": eraser_shape(tensors).rank}
    weights = io.BytesIO()
    torch.save(to_legacy(tensors, num_layers), weights)
    config_name, weights_name = FORMATS["legacy"]
    return {
        weights_name: weights.getvalue(),
        config_name: (json.dumps(facts, indent=4) + "\n").encode(),
    }


def write_eraser_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files; a new folder appears with all of them or not at all."""
    if folder.exists():
        _replace_files(folder, files)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as staging:
        staged = Path(staging, folder.name)
        staged.mkdir()
        write_eraser_files(staged, files)
        os.replace(staged, folder)


def _replace_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files or leave the old ones: weights that are sealed with another config are refused."""
    old = {name: (folder / name).read_bytes() for name in files if (folder / name).is_file()}
    written = []
    try:
        for name, content in files.items():
            write_atomically(folder / name, content)
            written.append(name)
    except BaseException:
        for name in written:
            if name in old:
                write_atomically(folder / name, old[name])
            else:
                (folder / name).unlink()
        raise
