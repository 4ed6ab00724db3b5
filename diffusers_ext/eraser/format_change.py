"""Write a saved eraser in the other format, from its files alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffusers_ext.core.sources import check_download_arguments
from diffusers_ext.eraser.config import DEFAULT_TARGET
from diffusers_ext.eraser.convert import EraserShape
from diffusers_ext.eraser.eraser_files import read_eraser
from diffusers_ext.eraser.written_files import (
    check_eraser_folder,
    check_eraser_tensors,
    described,
    eraser_contents,
    write_eraser_files,
)


def convert_eraser(
    pretrained_model_name_or_path: str | os.PathLike,
    save_directory: str | os.PathLike,
    format: str,
    *,
    concept: str | None = None,
    anchor_concept: str | None = None,
    base_model_name_or_path: str | None = None,
    **download_arguments: Any,
) -> EraserShape:
    """Read an eraser in either format and write it in one; its weights stay what they are.

    Args:
        pretrained_model_name_or_path: as in `load_eraser`.
        save_directory: folder, made when absent; other files in it stay.
        format: `"peft"` or `"legacy"`, which keeps nothing but the weights.
        concept, anchor_concept, base_model_name_or_path: as in `save_eraser`; as its file says when
            `None`.
        download_arguments: as in `load_eraser`, `subfolder` among them.

    Returns:
        What the tensors say about the model it is for.

    Raises:
        ValueError: missing or damaged files, an eraser without effect, a folder with an eraser in
            another format, or blocks without eraser in a model whose number of blocks is not known.
    """
    download = {name: value for name, value in download_arguments.items() if name != "subfolder"}
    check_download_arguments(download, "convert_eraser")
    folder = Path(save_directory)
    check_eraser_folder(folder, format)
    file = read_eraser(pretrained_model_name_or_path, **download_arguments)
    check_eraser_tensors(file.tensors, str(pretrained_model_name_or_path))
    if format == "legacy" and file.num_layers is None:
        raise ValueError(
            "`num_layers` of the eraser's config must be known to write the legacy format, got "
            f"None in {pretrained_model_name_or_path}. Load it into its model and save it again."
        )
    config = described(
        file.config,
        concept=concept,
        anchor_concept=anchor_concept,
        base_model_name_or_path=base_model_name_or_path,
    )
    config.target_modules = config.target_modules or {DEFAULT_TARGET}
    config.in_features, config.num_layers = file.shape.width, file.num_layers
    write_eraser_files(folder, eraser_contents(format, config, file.tensors, file.num_layers))
    return file.shape
