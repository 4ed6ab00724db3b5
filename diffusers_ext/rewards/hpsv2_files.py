"""Where HPSv2's two published checkpoints are: a file, a folder or the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from diffusers_ext.core.sources import files_on_hub


HPSV2_REPOSITORY = "xswu/HPSv2"
CHECKPOINTS = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


def check_version(version: str) -> str:
    """The version, if it is one that was published; raises `ValueError` otherwise."""
    if version not in CHECKPOINTS:
        raise ValueError(f"`version` must be one of {list(CHECKPOINTS)}, got {version!r}.")
    return version


def locate_checkpoint(
    source: str | os.PathLike, version: str, download_arguments: dict[str, Any]
) -> Path:
    """Path of a version's checkpoint, downloaded when `source` is neither a file nor a folder.

    Args:
        source: the file itself, a folder with the published file or the same as
            `.safetensors`, or `"user/name"`.
    """
    name, path = CHECKPOINTS[check_version(version)], Path(source)
    if path.is_file():
        stems = {Path(file).stem: published for published, file in CHECKPOINTS.items()}
        if stems.get(path.stem, version) != version:
            raise ValueError(
                f"`version` must be {stems[path.stem]!r} for {path.name}, got {version!r}."
            )
        return path
    if path.is_dir():
        candidates = [path / name, (path / name).with_suffix(".safetensors")]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            held = sorted(entry.name for entry in path.iterdir())
            raise ValueError(
                f"{path} must hold {name} for version {version}, got {held}. Download it from "
                f"https://huggingface.co/{HPSV2_REPOSITORY}."
            )
        return found[0]
    no_folder = (
        "`pretrained_model_name_or_path` must be a file, a folder or 'user/name', got "
        f"{source}: no such file or folder."
    )
    no_file = f"Repository {source} must hold {name}, got none."
    with files_on_hub(source, "HPSv2's weights", no_file=no_file, no_folder=no_folder):
        return Path(hf_hub_download(str(source), name, **download_arguments))
