"""LoRAs uploaded with their card, and how much of the model's knowledge they move."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffusers_ext.core.lora_formats import check_lora_effect, is_kohya_lora
from diffusers_ext.core.sources import LORA_WEIGHT_NAME
from diffusers_ext.core.tensor_files import open_tensors
from diffusers_ext.families import match_family
from diffusers_ext.families.lora_files import (
    export_lora,
    kept_metadata,
    read_lora,
    read_lora_file,
    second_file,
    training_metadata,
)
from diffusers_ext.hub import Licence, Measured
from diffusers_ext.hub.card import make_card
from diffusers_ext.hub.push import push_folder
from diffusers_ext.nullspace.statistics import FeatureStatistics


def push_lora(
    lora: str | os.PathLike,
    repo_id: str,
    *,
    instance_prompt: str | None = None,
    pipeline: str | type[DiffusionPipeline] | None = None,
    directions: str | None = None,
    trained_on: str | None = None,
    base_model: str | None = None,
    statistics: FeatureStatistics | None = None,
    license: str | Licence | None = None,
    settings: Mapping[str, Any] | None = None,
    results: Sequence[Measured] = (),
    widget: Sequence[tuple[str, str | os.PathLike]] = (),
    **hub_arguments: Any,
) -> str:
    """Upload a LoRA as `pytorch_lora_weights.safetensors`, alone or with its statistics.

    Key names of kohya's scripts become those of diffusers, and a second file serves other programs where they know
    other names: `comfyui_a1111_kohya.safetensors` of a UNet, `comfyui.safetensors` of a transformer such as Wan's. The
    facts for the card have no defaults.

    Args:
        lora: a `.safetensors` file, or a folder with `pytorch_lora_weights.safetensors`.
        pipeline: class of diffusers, or its name, that loads the LoRA.
        directions: `"generalized"`, `"null"`, `"soft"`, or `"plain"` for an ordinary LoRA.
        trained_on: the pictures it was trained on, in words.
        base_model: Hub name; that of `statistics` when `None`.
        statistics: under which it was trained; uploaded to `statistics/`.
        license: as of the base model when `None`.
        widget: (prompt, local picture) to show; uploaded to `pictures/`.
        hub_arguments: `private`, `token`, `revision`, `create_pr`, `commit_message`, `subfolder`.

    Returns:
        Address of the commit, or of the pull request. Nothing is uploaded where a fact is missing.
    """
    tensors = read_lora(lora)
    check_lora_effect(tensors)
    if base_model is None and statistics is not None:
        base_model = statistics.facts.get("base_model") or None
    names = [f"pictures/{index}{Path(path).suffix}" for index, (_, path) in enumerate(widget)]
    missing = [str(path) for _, path in widget if not Path(path).is_file()]
    if missing:
        raise ValueError(f"`widget` must name picture files, got {missing}: no such files.")
    other = second_file(tensors, None if pipeline is None else match_family(pipeline))
    card = make_card(
        "null_space_lora",
        base_model=base_model,
        license=license,
        trained_on=trained_on,
        settings=settings,
        results=results,
        widget=[(prompt, name) for (prompt, _), name in zip(widget, names)],
        token=hub_arguments.get("token"),
        instance_prompt=instance_prompt,
        pipeline=getattr(pipeline, "__name__", pipeline),
        directions=directions,
        rank=max(a.shape[0] for key, a in tensors.items() if key.endswith(".lora_A.weight")),
        statistics=statistics is not None,
        kohya_file=other,
    )
    with tempfile.TemporaryDirectory() as upload:
        told = training_metadata(instance_prompt=instance_prompt, base_model=base_model)
        _write_files(lora, Path(upload), other, pipeline, told)
        if statistics is not None:
            statistics.save_pretrained(Path(upload, "statistics"))
        for (_, path), name in zip(widget, names):
            Path(upload, name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, Path(upload, name))
        return push_folder(upload, repo_id, card, **hub_arguments)


def _write_files(
    lora: str | os.PathLike, folder: Path, other: str, pipeline: Any, metadata: Mapping[str, str]
) -> None:
    """The files of the weights; the one for other programs where it has a name."""
    file = Path(lora, LORA_WEIGHT_NAME) if Path(lora).is_dir() else Path(lora)
    with open_tensors(file) as handle:
        is_kohya = is_kohya_lora(handle.keys())
    target = folder / LORA_WEIGHT_NAME
    if is_kohya:
        export_lora(file, "diffusers", target)
    else:
        shutil.copyfile(file, target)
    if other:
        # What the training wrote knows more.
        told = {**metadata, **kept_metadata(read_lora_file(target)[1])}
        export_lora(target, "comfyui", folder / other, metadata=told, pipeline=pipeline)


def measured_drift(drifts: Mapping[str, float], statistics: FeatureStatistics) -> list[Measured]:
    """The figure of `predicted_drift` that a card shows: its mean over the changed layers."""
    mean = float(f"{sum(drifts.values()) / len(drifts):.4g}")
    prompts = f"{len(statistics.facts['prompts'])} preserved prompts"
    notes = f"mean over {len(drifts)} linear layers, from the statistics, without pictures"
    return [Measured(prompts, "relative drift of the changed layers' outputs", mean, notes=notes)]
