"""Take out of a LoRA that is there what acts on preserved inputs, and tell how much of it does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.nullspace.directions import check_new_subject
from diffusers_ext.nullspace.lora import instance_statistics_like
from diffusers_ext.nullspace.lora_files import (
    LoraSource,
    StateDict,
    check_lora_effect,
    check_output_path,
    read_lora,
    write_lora,
)
from diffusers_ext.nullspace.projector import NullSpaceProjector, project_rows, subject_projection
from diffusers_ext.nullspace.statistics import FeatureStatistics

_DENOISERS = ("unet", "transformer")


def subject_projections(
    statistics: FeatureStatistics, instance_statistics: FeatureStatistics, strictness: float
) -> dict[str, torch.Tensor]:
    """`subject_projection` of every Linear that both statistics cover, by its dotted name."""
    check_new_subject(statistics, instance_statistics)
    by_keys: dict[tuple[str, str], torch.Tensor] = {}
    projections = {}
    for linear, key in statistics.sources.items():
        keys = (key, instance_statistics.key(linear))
        if keys not in by_keys:
            old, new = statistics.moments[keys[0]].mean, instance_statistics.moments[keys[1]].mean
            by_keys[keys] = subject_projection(new.double(), old.double(), strictness)
        projections[linear] = by_keys[keys]
    return projections


def debleed_lora(
    lora: LoraSource,
    statistics: FeatureStatistics,
    *,
    instance_prompts: Sequence[str] = (),
    pipeline: DiffusionPipeline | None = None,
    instance_statistics: FeatureStatistics | None = None,
    strictness: float = 10.0,
    projector: NullSpaceProjector | None = None,
    uncovered: str = "error",
    output_path: str | os.PathLike | None = None,
    **criterion: float,
) -> StateDict:
    """Take out of an existing LoRA what acts on preserved inputs: `A <- A P`, without training.

    With the prompts that ask for its subject, what it does on them is kept as far as can be (`subject_projection`).
    Without them, all that preserved inputs use is cut off or damped, whether the subject needs it or not.

    Args:
        lora: as in `read_lora`, for the model that `statistics` were collected on.
        pipeline: the base model, to read `instance_prompts` with.
        strictness: of `subject_projection`; more protects more and keeps less of the subject.
        projector: in place of instance prompts and of `criterion`.
        uncovered: what to do with modules that have no statistic: `"error"`, `"keep"`, `"drop"`.
        output_path: file to write in diffusers format.
        criterion: one of `NullSpaceProjector.from_statistics`, e.g. `damping=1e-3`, `energy=1e-4`.

    Returns:
        The projected LoRA, keys as in `read_lora`, dtypes as they were.
    """
    if uncovered not in ("error", "keep", "drop"):
        raise ValueError(f"`uncovered` must be 'error', 'keep' or 'drop', got {uncovered!r}.")
    check_output_path(output_path)
    ways = (instance_prompts, instance_statistics is not None, projector is not None, criterion)
    if sum(map(bool, ways)) != 1:
        raise ValueError(
            "One of `instance_prompts`, `instance_statistics`, `projector` and one criterion must be "
            "given, got none or several."
        )
    if instance_prompts:
        if pipeline is None:
            raise ValueError("`pipeline` must be given to read `instance_prompts`, got None.")
        instance_statistics = instance_statistics_like(pipeline, statistics, instance_prompts)
    if instance_statistics is not None:
        projections = subject_projections(statistics, instance_statistics, strictness)
    else:
        projector = projector or NullSpaceProjector.from_statistics(statistics, **criterion)
        projections = projector.projections()
    result, missing = _projected(read_lora(lora), projections, uncovered == "keep")
    if missing and uncovered == "error":
        raise ValueError(
            f"`statistics` must cover every module of the LoRA, got none for {len(missing) // 2}, the "
            f"first is {missing[0]!r}. Collect more features, or pass uncovered='keep' or 'drop'."
        )
    check_lora_effect(result)
    if output_path is not None:
        write_lora(result, output_path)
    return result


def _projected(
    lora: StateDict, projections: Mapping[str, torch.Tensor], keep_uncovered: bool
) -> tuple[StateDict, list[str]]:
    """The LoRA with its A projected, and the keys of modules without a projection."""
    result: StateDict = {}
    missing = []
    for key, tensor in lora.items():
        linear = _linear(key.rsplit(".lora_", 1)[0])
        if linear in projections:
            is_a = key.endswith(".lora_A.weight")
            result[key] = project_rows(tensor, projections[linear]) if is_a else tensor
        else:
            missing.append(key)
            if keep_uncovered:
                result[key] = tensor
    return result, missing


def _linear(module: str) -> str | None:
    """Dotted name in the denoiser of a module with its component; `None` for one of a text encoder."""
    component, _, name = module.partition(".")
    return name if component in _DENOISERS else None


def _modules(lora: StateDict) -> list[str]:
    ending = ".lora_A.weight"
    return [key.removesuffix(ending) for key in lora if key.endswith(ending)]


def uncovered_modules(lora: LoraSource, statistics: FeatureStatistics) -> list[str]:
    """Modules of a LoRA that no statistic covers, with their component: nothing is known of what they do.

    Every module of a text encoder is among them: one that changes also changes what the covered modules read, which
    then is not what was measured.
    """
    return [module for module in _modules(read_lora(lora)) if _linear(module) not in statistics.sources]


def preserved_energy(lora: LoraSource, statistics: FeatureStatistics) -> dict[str, float]:
    """`tr(D C D^T)` of each covered Linear: how strongly the update `D` of a LoRA acts on preserved inputs.

    Divided by `tr(W C W^T)` of the model's own weights it is `predicted_drift`; so the share of it that `debleed_lora`
    leaves is the share of the predicted drift.
    """
    tensors, energies = read_lora(lora), {}
    for module in _modules(tensors):
        linear = _linear(module)
        if linear in statistics.sources:
            moment = statistics.moments[statistics.key(linear)].mean.double()
            a = tensors[f"{module}.lora_A.weight"].to(moment)
            b = tensors[f"{module}.lora_B.weight"].to(moment)
            # tr(B A C A^T B^T), at the cost of the rank.
            energies[linear] = float(((a @ moment @ a.T) * (b.T @ b)).sum())
    return energies
