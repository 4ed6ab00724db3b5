"""Save an eraser of a CogVideoX transformer, or a saved one in the other format."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffusers_ext.core.sources import check_download_arguments
from diffusers_ext.core.tensor_files import FLOATING
from diffusers_ext.eraser.adapter.config import DEFAULT_TARGET, EraserConfig
from diffusers_ext.eraser.card import eraser_card, facts_of_config
from diffusers_ext.eraser.files.convert import EraserShape, StateDict
from diffusers_ext.eraser.files.formats import (
    FILE_NAMES,
    check_eraser_folder,
    check_eraser_tensors,
    described,
    eraser_contents,
    read_eraser,
    write_eraser_files,
)
from diffusers_ext.eraser.files.load import (
    EraserTarget,
    eraser_tensors,
    find_eraser,
    find_transformer,
)
from diffusers_ext.eraser.masks.attention import find_joint_attentions
from diffusers_ext.hub.card import Card
from diffusers_ext.hub.push import push_folder, split_arguments


def save_eraser(
    transformer_or_pipe: EraserTarget,
    save_directory: str | os.PathLike,
    *,
    adapter_name: str | None = None,
    format: str = "peft",
    dtype: torch.dtype | None = None,
    concept: str | None = None,
    anchor_concept: str | None = None,
    base_model_name_or_path: str | None = None,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    **hub_arguments: Any,
) -> None:
    """Write an eraser to a folder that `load_eraser` reads; equal erasers are equal files.

    `"peft"` is also what `PeftModel.from_pretrained` reads. `"legacy"` is for the code of
    T2VUnlearning; it keeps neither the concept nor the model's name. Facts that are not given are those of
    the eraser's config, or of the transformer.

    Args:
        transformer_or_pipe: a CogVideoX transformer, compiled or not, a pipeline or PeftModel of it.
        save_directory: folder, made when absent; other files in it stay.
        adapter_name: which eraser; the only one when `None`.
        format: `"peft"` (`adapter_config.json`, `adapter_model.safetensors`) or `"legacy"`
            (`eraser_config.json`, `eraser_weights.pt`).
        dtype: of the saved weights; as they are when `None`.
        concept, anchor_concept: what it erases and what takes its place.
        base_model_name_or_path: the transformer it is for.
        push_to_hub: upload these files afterwards, in place of an eraser in the other format.
        repo_id: repository; the folder's name when `None`.
        hub_arguments: with `push_to_hub`: `private`, `token`, `revision`, `create_pr`,
            `commit_message`, `subfolder`; and for the model card `trained_on`, `preserved_concepts`,
            `base_model` (the pipeline; as `base_model_name_or_path` when absent), `license`,
            `settings` and `results`.

    Raises:
        ValueError: no such eraser, one without effect or with values that are not finite, an
            unknown format, a folder with an eraser in the other format, or a missing fact for the
            card. Nothing is written.
    """
    folder = Path(save_directory)
    check_eraser_folder(folder, format)
    transformer = find_transformer(transformer_or_pipe)
    adapter_name = find_eraser(transformer, adapter_name)
    tensors = eraser_tensors(transformer, adapter_name)
    _check_in_memory(tensors)
    tensors = {n: t.detach().to("cpu", dtype).contiguous() for n, t in tensors.items()}
    check_eraser_tensors(tensors, adapter_name, dtype)
    config = transformer.peft_config[adapter_name]
    # PEFT's own wrapper forgets the name of a diffusers model.
    known_name = config.base_model_name_or_path or transformer.config.get("_name_or_path")
    config = described(
        config,
        concept=concept,
        anchor_concept=anchor_concept,
        base_model_name_or_path=base_model_name_or_path or known_name or None,
    )
    num_layers = len(find_joint_attentions(transformer))
    files = eraser_contents(format, config, tensors, num_layers, type(transformer))
    hub, card = _upload_parts(config, tensors, push_to_hub, hub_arguments)
    write_eraser_files(folder, files)
    if card is not None:
        # Not the folder itself, which may hold the checkpoints of a training run.
        with tempfile.TemporaryDirectory() as upload:
            write_eraser_files(Path(upload), files)
            name = repo_id or folder.resolve().name
            push_folder(upload, name, card, delete_patterns=FILE_NAMES, **hub)


def _upload_parts(
    config: EraserConfig, tensors: StateDict, push_to_hub: bool, arguments: dict[str, Any]
) -> tuple[dict[str, Any], Callable[..., Card] | None]:
    """What `push_folder` takes besides the folder; no card where nothing is uploaded."""
    if not push_to_hub:
        if arguments:
            raise TypeError(
                f"{sorted(arguments)} must come with `push_to_hub=True`, got them without."
            )
        return {}, None
    hub, facts = split_arguments(arguments)
    facts = {**facts_of_config(config), **facts}
    return hub, eraser_card(tensors, token=hub.get("token"), **facts)


def _check_in_memory(tensors: StateDict) -> None:
    for name, tensor in tensors.items():
        kind = type(tensor.data).__name__
        if tensor.dtype not in FLOATING or kind != "Tensor":
            stored = str(tensor.dtype) if kind == "Tensor" else f"a {kind}"
            raise ValueError(
                "The eraser's weights must be float16, bfloat16, float32 or float64 to be saved, got "
                f"`{name}` as {stored}, as after layerwise casting or a quantisation of the "
                "transformer. Save the eraser before that, or copy the files it was loaded from."
            )
    if any(tensor.device.type == "meta" for tensor in tensors.values()):
        raise ValueError(
            "The eraser's weights must be in memory, got the meta device, as after "
            "`enable_sequential_cpu_offload()`. Save it before that call."
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

    The source is given as to `load_eraser` (`subfolder` among the `download_arguments`), the rest as to
    `save_eraser`. Returns what the tensors say about the model it is for.

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
