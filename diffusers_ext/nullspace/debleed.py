"""Take out of a LoRA that is there what acts on preserved inputs, and tell how much of it does.

The Linears of a text encoder read text alone, so all that is said of a denoiser's (`text_only`) holds for them: an
update that is zero on what they read for a prompt leaves the prompt's embeddings as they were.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.core.capture import capture
from diffusers_ext.core.lora_formats import check_lora_effect
from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.families.lora_files import (
    LoraSource,
    StateDict,
    adapter_metadata,
    check_output_path,
    read_lora,
    write_lora,
)
from diffusers_ext.nullspace.directions import check_new_subject
from diffusers_ext.nullspace.edit_equations import read_weight
from diffusers_ext.nullspace.lora import instance_statistics_like
from diffusers_ext.nullspace.projector import NullSpaceProjector, project_rows, subject_projection
from diffusers_ext.nullspace.prompts import preserved_texts, unique
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.nullspace.text_only import denoiser_arguments

_DENOISERS = ("unet", "transformer")
# Linears of CLIP and T5 that read one tensor, by the ends of their names.
_ONE_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"q", "k", "v"}, {"wi_0", "wi_1"})


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


def with_text_encoders(
    statistics: FeatureStatistics, pipeline: DiffusionPipeline, lora: LoraSource, *, batch_size: int = 64
) -> FeatureStatistics:
    """The same statistics with those of the text encoders' Linears that a LoRA changes, for `debleed_lora`.

    The prompts of the statistics are read once more, with their sub-phrases and guidance prompts as they were
    collected. The result is for use, not for a file: names of text encoders begin with their component.

    Args:
        pipeline: the base model of the statistics, without the LoRA.

    Raises:
        ValueError: statistics of another model or without prompts; a module that the text encoders do not have.
    """
    statistics.check_pipeline(pipeline)
    prompts, settings = statistics.facts["prompts"], statistics.facts["settings"]
    if not prompts:
        raise ValueError("`statistics` must name their prompts to read them by the text encoders, got none.")
    linears = _text_encoder_linears(pipeline, lora_modules(read_lora(lora)))
    # Statistics of earlier versions have sub-phrases alone.
    recombinations = settings.get("recombinations", 0)
    texts = preserved_texts(prompts, recombinations) if settings.get("expand_sub_phrases") else prompts
    moments = _text_encoder_moments(pipeline, linears, texts, batch_size)
    if settings.get("include_guidance_prompts", True):
        guided = unique(["", settings.get("negative_prompt", "")])
        for key, moment in _text_encoder_moments(pipeline, linears, guided, batch_size).items():
            moments[key].merge(moment.repeated(len(prompts)))
    sources = {**statistics.sources, **{name: _input_name(name) for name in linears}}
    return FeatureStatistics({**statistics.moments, **moments}, sources, statistics.facts)


def _text_encoder_linears(pipeline: DiffusionPipeline, modules: Sequence[str]) -> dict[str, torch.nn.Module]:
    """The text encoders' Linears that a LoRA's modules name, by these names."""
    found: dict[str, torch.nn.Module] = {}
    for module in modules:
        component, _, name = module.partition(".")
        if component in _DENOISERS:
            continue
        inside = dict(getattr(pipeline, component, None).named_modules()) if getattr(pipeline, component, None) else {}
        # CLIP without a projection has lost the first part of its names in transformers 5; files have it.
        linear = inside.get(name, inside.get(name.removeprefix("text_model.")))
        if linear is None or not hasattr(linear, "in_features"):
            raise ValueError(
                f"`lora` must change Linears that the base model has, got {module!r}, which "
                f"{type(pipeline).__name__} lacks."
            )
        found[module] = linear
    return found


def _input_name(linear: str) -> str:
    """Key of the moment of a text encoder's Linear."""
    layer, _, leaf = linear.rpartition(".")
    one = next((names for names in _ONE_INPUT if leaf in names), {leaf})
    return f"{layer}.{'|'.join(sorted(one))}"


def _text_encoder_moments(
    pipeline: DiffusionPipeline, linears: Mapping[str, torch.nn.Module], prompts: Sequence[str], batch_size: int
) -> dict[str, SecondMoment]:
    """Second moments of what the Linears read for prompts, at all positions of tokens, in float64."""
    readers = {_input_name(name): linear for name, linear in reversed(linears.items())}
    moments = {
        key: SecondMoment(linear.in_features, linear.weight.device, torch.float64) for key, linear in readers.items()
    }
    if not readers:
        return moments
    with capture(denoiser_of(pipeline), readers, lambda key, features: moments[key].update(features)):
        for start in range(0, len(prompts), batch_size):
            denoiser_arguments(pipeline, prompts[start : start + batch_size])
    for key, moment in moments.items():
        moment.check_finite(key)
    return moments


def measured_linears(pipeline: DiffusionPipeline, names: Sequence[str]) -> dict[str, torch.nn.Module]:
    """The Linears of a pipeline by their names in statistics."""
    encoders = _text_encoder_linears(pipeline, [name for name in names if name.startswith("text_encoder")])
    denoiser = denoiser_of(pipeline)
    return {name: encoders[name] if name in encoders else denoiser.get_submodule(name) for name in names}


def relative_drift(lora: LoraSource, statistics: FeatureStatistics, pipeline: DiffusionPipeline) -> dict[str, float]:
    """`tr(D C D^T) / tr(W C W^T)` of each covered Linear: how much of its outputs on preserved inputs a LoRA moves."""
    energies, found = preserved_energy(lora, statistics), {}
    linears = measured_linears(pipeline, list(energies))
    for name, energy in energies.items():
        weight = read_weight(linears[name])
        moment = statistics.moments[statistics.key(name)].mean.to(weight)
        found[name] = energy / ((weight @ moment) * weight).sum().item()
    return found


def debleed_lora(
    lora: LoraSource,
    statistics: FeatureStatistics,
    *,
    instance_prompts: Sequence[str] = (),
    text_encoders: bool = False,
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
        text_encoders: also project what the LoRA changes in text encoders, which are read with the prompts of the
            statistics (`with_text_encoders`); they have no statistic otherwise.
        pipeline: the base model, to read prompts with.
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
    if text_encoders:
        if pipeline is None:
            raise ValueError("`pipeline` must be given with `text_encoders`, got None.")
        statistics = with_text_encoders(statistics, pipeline, lora)
        if instance_statistics is not None:
            instance_statistics = with_text_encoders(instance_statistics, pipeline, lora)
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
        write_lora(result, output_path, adapter_metadata(result))
    return result


def _projected(
    lora: StateDict, projections: Mapping[str, torch.Tensor], keep_uncovered: bool
) -> tuple[StateDict, list[str]]:
    """The LoRA with its A projected, and the keys of modules without a projection."""
    result: StateDict = {}
    missing = []
    for key, tensor in lora.items():
        linear = statistic_name(key.rsplit(".lora_", 1)[0])
        if linear in projections:
            is_a = key.endswith(".lora_A.weight")
            result[key] = project_rows(tensor, projections[linear]) if is_a else tensor
        else:
            missing.append(key)
            if keep_uncovered:
                result[key] = tensor
    return result, missing


def statistic_name(module: str) -> str:
    """The name in statistics of a module with its component: that in the denoiser, the whole of a text encoder's."""
    component, _, name = module.partition(".")
    return name if component in _DENOISERS else module


def lora_modules(lora: StateDict) -> list[str]:
    """The modules that a LoRA changes, with their component."""
    ending = ".lora_A.weight"
    return [key.removesuffix(ending) for key in lora if key.endswith(ending)]


def uncovered_modules(lora: LoraSource, statistics: FeatureStatistics) -> list[str]:
    """Modules of a LoRA that no statistic covers, with their component: nothing is known of what they do.

    Every module of a text encoder is among them, unless statistics are `with_text_encoders`: one that changes also
    changes what the covered modules read, which then is not what was measured.
    """
    return [module for module in lora_modules(read_lora(lora)) if statistic_name(module) not in statistics.sources]


def preserved_energy(lora: LoraSource, statistics: FeatureStatistics) -> dict[str, float]:
    """`tr(D C D^T)` of each covered Linear: how strongly the update `D` of a LoRA acts on preserved inputs.

    Divided by `tr(W C W^T)` of the model's own weights it is `predicted_drift`; so the share of it that `debleed_lora`
    leaves is the share of the predicted drift.
    """
    tensors, energies = read_lora(lora), {}
    for module in lora_modules(tensors):
        linear = statistic_name(module)
        if linear in statistics.sources:
            moment = statistics.moments[statistics.key(linear)].mean.double()
            a = tensors[f"{module}.lora_A.weight"].to(moment)
            b = tensors[f"{module}.lora_B.weight"].to(moment)
            # tr(B A C A^T B^T), at the cost of the rank.
            energies[linear] = float(((a @ moment @ a.T) * (b.T @ b)).sum())
    return energies
