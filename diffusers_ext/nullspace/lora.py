"""LoRAs that leave preserved inputs alone: trained along directions chosen by statistics, frozen A and trained B."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.core.capture import natural_key
from diffusers_ext.core.pipelines import plain_class
from diffusers_ext.families import match_family
from diffusers_ext.families.lora_files import add_metadata, add_second_file
from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.directions import NullSpaceDirections, null_space_directions, usual_null_space
from diffusers_ext.nullspace.edit_equations import read_weight
from diffusers_ext.nullspace.projector import NullSpaceProjector
from diffusers_ext.nullspace.prompts import check_prompts
from diffusers_ext.nullspace.slots import check_widths
from diffusers_ext.nullspace.statistics import FeatureStatistics

# Harmless options, and those that the caller of `check_lora_config` sets by itself.
_FREE = {"lora_dropout", "exclude_modules", "init_lora_weights"}
_SET_LATER = {"r", "lora_alpha", "use_rslora", "target_modules"}
INSTANCE_RUNS = 16  # of a joint model, whose text depends on the picture
DIRECTION_KINDS = ("generalized", "null", "soft")
logger = logging.getLogger(__name__)


def check_lora_config(config: LoraConfig) -> None:
    """Raise `ValueError` for LoRA options that break `D x = 0` on preserved inputs."""
    if config.use_dora:
        raise ValueError(
            "`use_dora` must be False, got True: DoRA rescales each row by the norm of W + D, which "
            "changes the outputs on preserved inputs."
        )
    if config.bias != "none":
        raise ValueError(f"`bias` must be 'none', got {config.bias!r}: a bias acts on every input, preserved or not.")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            "`init_lora_weights` must be True, False or 'gaussian', got "
            f"{config.init_lora_weights!r}: other ways need more than A and B."
        )
    usual = LoraConfig().to_dict()
    for name, value in config.to_dict().items():
        if name not in _FREE | _SET_LATER and value != usual[name]:
            raise ValueError(
                f"`{name}` must be left at {usual[name]!r}, got {value!r}: only A and B of the "
                "constrained layers may change."
            )


def instance_statistics_like(
    pipeline: DiffusionPipeline, statistics: FeatureStatistics, instance_prompts: Sequence[str]
) -> FeatureStatistics:
    """Statistics of the instance prompts alone, for the same features, layers and runs as `statistics`."""
    settings = statistics.facts["settings"]
    if "features" not in settings and "scope" not in settings:
        raise ValueError(
            "`statistics` must tell how they were collected, got imported ones that do not. Pass "
            "`instance_statistics`."
        )
    instance_prompts, run = check_prompts(instance_prompts, "instance_prompts"), dict(settings.get("run", {}))
    run.pop("token_share", None)  # a subject has few tokens
    if "scope" in settings:
        chosen = {"scope": settings["scope"]}
        run |= {"runs_per_prompt": math.ceil(INSTANCE_RUNS / len(instance_prompts))} if run else {}
    else:
        chosen = {name: settings[name] for name in ("features", "layers")}
    return collect_statistics(
        pipeline,
        instance_prompts,
        negative_prompt=settings["negative_prompt"],
        expand_sub_phrases=False,
        include_guidance_prompts=False,
        show_progress=False,
        **chosen,
        **run,
    )


def add_null_space_lora(
    unet: torch.nn.Module,
    statistics: FeatureStatistics,
    *,
    instance_prompts: Sequence[str] | None = None,
    pipeline: DiffusionPipeline | None = None,
    instance_statistics: FeatureStatistics | None = None,
    rank: int = 1,
    directions: str = "generalized",
    eps: float = 1e-4,
    projector: NullSpaceProjector | None = None,
    adapter_name: str = "default",
    lora_config: LoraConfig | None = None,
) -> NullSpaceDirections | None:
    """Add a trainable LoRA to `unet` on every Linear that `statistics` cover.

    With `"generalized"` and `"null"` directions A is frozen and only B trains, so the update stays in the chosen
    directions under any optimizer. With `"soft"` both train; add `preservation_penalty` to the loss. The result is an
    ordinary LoRA of scale 1 in float32.

    Args:
        instance_prompts: of the new subject; they need `pipeline`, which `unet` belongs to.
        instance_statistics: ready statistics of the subject, in place of the prompts.
        eps: of the generalised problem.
        projector: null spaces for `"null"`; those of `usual_null_space` when `None`.
        lora_config: further LoRA options (dropout); its rank, scale and targets are set here.

    Returns:
        The directions, for their `report()`; `None` for `"soft"`.
    """
    if directions not in DIRECTION_KINDS:
        raise ValueError(f"`directions` must be one of {DIRECTION_KINDS}, got {directions!r}.")
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}.")
    config = copy.deepcopy(lora_config or LoraConfig())
    check_lora_config(config)
    if adapter_name in getattr(unet, "peft_config", {}):
        raise ValueError(f"`adapter_name` must be new to the UNet, got {adapter_name!r} again.")
    statistics.check_same_models({"denoiser": fingerprint(unet)})
    check_widths(unet, statistics.widths)
    if pipeline is not None:
        statistics.check_pipeline(pipeline)
    chosen = None
    if directions != "soft":
        if instance_statistics is None:
            if instance_prompts is None or pipeline is None:
                raise ValueError(
                    "`instance_prompts` with `pipeline`, or `instance_statistics`, must be given, got neither."
                )
            instance_statistics = instance_statistics_like(pipeline, statistics, instance_prompts)
        null_space = ""
        if directions == "null" and projector is None:
            projector, null_space = usual_null_space(statistics, instance_statistics, rank)
            logger.info("Null directions are those of the %s.", null_space)
        chosen = null_space_directions(
            statistics,
            instance_statistics,
            rank,
            eps,
            projector=projector if directions == "null" else None,
            null_space=null_space,
        )
    config.r, config.lora_alpha, config.use_rslora = rank, rank, False
    # A list, because the order of a set of strings differs from process to process.
    config.target_modules = [name for name in statistics.linears if chosen is None or name in chosen.sources]
    unet.add_adapter(config, adapter_name=adapter_name)
    for name, layer in lora_linears(unet, adapter_name):
        a, b = layer.lora_A[adapter_name].float(), layer.lora_B[adapter_name].float()
        if chosen is not None:
            a.requires_grad_(False).weight.copy_(chosen.vectors(name))
            torch.nn.init.zeros_(b.weight)
    return chosen


def lora_linears(model: torch.nn.Module, adapter_name: str = "default") -> list[tuple[str, LoraLayer]]:
    """The (dotted name, PEFT layer) pairs that carry an adapter, in natural order."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)  # quantised Linears have layers of their own
        and isinstance(module.get_base_layer(), torch.nn.Linear)
        and adapter_name in module.lora_A
    ]
    return sorted(found, key=lambda pair: natural_key(pair[0]))


def lora_delta(layer: LoraLayer, adapter_name: str = "default") -> torch.Tensor:
    """`D = scale B A`, `(out_features, in_features)`, with gradient."""
    a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    return layer.scaling[adapter_name] * (b @ a)


def preservation_penalty(
    model: torch.nn.Module, statistics: FeatureStatistics, adapter_name: str = "default"
) -> torch.Tensor:
    """Mean over Linears of `predicted_drift`, differentiable in the adapter: the loss term of `"soft"` directions."""
    return torch.stack(list(_relative_drifts(model, statistics, adapter_name).values())).mean()


def predicted_drift(
    model: torch.nn.Module, statistics: FeatureStatistics, adapter_name: str = "default"
) -> dict[str, float]:
    """`tr(D C D^T) / tr(W C W^T)`, the relative drift on preserved inputs of every adapted Linear's outputs."""
    with torch.no_grad():
        drifts = _relative_drifts(model, statistics, adapter_name)
    return {name: drift.item() for name, drift in drifts.items()}


def _relative_drifts(
    model: torch.nn.Module, statistics: FeatureStatistics, adapter_name: str
) -> dict[str, torch.Tensor]:
    means: dict[str, torch.Tensor] = {}
    drifts = {}
    for name, layer in lora_linears(model, adapter_name):
        key = statistics.key(name)
        weight = layer.get_base_layer().weight
        if type(weight.data) is not torch.Tensor or not weight.is_floating_point():
            weight = read_weight(layer.get_base_layer())
        if key not in means:
            means[key] = statistics.moments[key].mean.to(weight.device, torch.float32)
        delta, weight = lora_delta(layer, adapter_name), weight.float()
        moved = ((delta @ means[key]) * delta).sum()
        drifts[name] = moved / ((weight @ means[key]) * weight).sum()
    if not drifts:
        raise ValueError(f"`model` must carry the LoRA {adapter_name!r}, got none.")
    return drifts


def save_lora(
    pipeline_class: type[DiffusionPipeline] | Any,
    unet: torch.nn.Module,
    directory: str | os.PathLike,
    adapter_name: str = "default",
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write the LoRA for diffusers, and again where ComfyUI, A1111 and kindred programs know other names.

    `pytorch_lora_weights.safetensors` is diffusers' own, by `save_lora_weights`; of a UNet
    `comfyui_a1111_kohya.safetensors` and of some transformers (Wan) `comfyui.safetensors`, which is returned, has the
    names that the others know. Where these are diffusers', its one file is returned. Equal LoRAs are equal files.
    """
    layers = lora_linears(unet, adapter_name)
    for name, layer in layers:
        if not torch.isfinite(layer.lora_B[adapter_name].weight).all():
            raise ValueError(
                f"A saved LoRA must be finite, got B of {name!r}, which is not. Train with a lower learning rate."
            )
    if not any(layer.lora_B[adapter_name].weight.any() for _, layer in layers):
        raise ValueError("A saved LoRA must have an effect, got all B matrices zero. Train it first.")
    family = match_family(unet)
    part = "unet" if family is None else family.denoiser
    # That of our own pipelines would write the second file without this metadata.
    plain_class(pipeline_class).save_lora_weights(
        save_directory=str(directory),
        **{
            f"{part}_lora_layers": get_peft_model_state_dict(unet, adapter_name=adapter_name),
            f"{part}_lora_adapter_metadata": unet.peft_config[adapter_name].to_dict(),
        },
    )
    return add_second_file(directory, unet, metadata) or add_metadata(directory, metadata)
