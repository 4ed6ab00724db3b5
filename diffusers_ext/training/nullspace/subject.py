"""A subject: trained as a LoRA on chosen directions or as whole weights under projection, saved, told of, uploaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from peft import LoraConfig

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.core.pipelines import denoiser_of, plain_class_name
from diffusers_ext.core.sources import LORA_WEIGHT_NAME
from diffusers_ext.families import find_family
from diffusers_ext.families.lora_files import COMFYUI_NAME, KOHYA_NAME, second_file, training_metadata
from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.hub.kinds import public_name
from diffusers_ext.nullspace.lora import add_null_space_lora, lora_linears, predicted_drift, save_lora
from diffusers_ext.nullspace.lora_upload import measured_drift
from diffusers_ext.nullspace.projector import NullSpaceProjector
from diffusers_ext.nullspace.scope import check_no_features, scoped_linears, settle_scope
from diffusers_ext.nullspace.settings import GUIDANCE, WEIGHTING_SCHEMES, NullSpaceSettings, read_layers
from diffusers_ext.nullspace.slots import check_widths, find_linears
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.nullspace.step import DreamBoothLoss, SoftLoss, schedule_of
from diffusers_ext.training.nullspace.data import (
    encode_condition,
    encode_conditions,
    encode_images,
    list_images,
    make_class_images,
    own_sizes,
    picture_prompts,
    read_captions,
    sampling_arguments,
    subject_prompts,
)
from diffusers_ext.training.run.checkpoints import KeepRule, is_trainable
from diffusers_ext.training.run.script import (
    ON_THE_WAY,
    card_arguments,
    counted,
    left_here,
    push_output,
    script_line,
    staged_output,
    steps_taken,
    widget_of,
)


class Preparation(NamedTuple):
    """What makes a denoiser trainable."""

    projections: dict[torch.nn.Parameter, torch.Tensor]  # of whole weights; empty with a LoRA
    report: list[dict]  # on the directions of a LoRA


def null_space_cut(settings: NullSpaceSettings, statistics: FeatureStatistics) -> NullSpaceProjector:
    """The null spaces of `--null_energy` or `--nullspace_threshold`; 1e-3 of the energy by default."""
    if settings.null_energy is None and settings.nullspace_threshold is not None:
        return NullSpaceProjector.from_statistics(statistics, threshold=settings.nullspace_threshold)
    energy = 1e-3 if settings.null_energy is None else settings.null_energy
    return NullSpaceProjector.from_statistics(statistics, energy=energy)


def add_lora(
    settings: NullSpaceSettings, pipeline: DiffusionPipeline, statistics: FeatureStatistics | None
) -> list[dict]:
    """Put the LoRA on the denoiser; returns the report on its directions.

    Without statistics it is an unconstrained one on the same Linears, for comparison.
    """
    denoiser = denoiser_of(pipeline)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.rank, lora_dropout=settings.lora_dropout, init_lora_weights="gaussian"
    )
    if statistics is None:
        # A list, because the order of a set of strings differs from process to process.
        config.target_modules = unconstrained_linears(settings, pipeline)
        denoiser.add_adapter(config)
        for _, layer in lora_linears(denoiser):
            layer.lora_A.float()
            layer.lora_B.float()
        return []
    # Without flags that ask for null spaces the statistics and the subject decide.
    asked = settings.directions == "null" and (settings.null_energy, settings.nullspace_threshold) != (None, None)
    chosen = add_null_space_lora(
        denoiser,
        statistics,
        instance_prompts=subject_prompts(settings),
        pipeline=pipeline,
        rank=settings.rank,
        directions=settings.directions,
        eps=settings.eps,
        projector=null_space_cut(settings, statistics) if asked else None,
        lora_config=config,
    )
    return [] if chosen is None else chosen.report()


def unconstrained_linears(settings: NullSpaceSettings, pipeline: DiffusionPipeline) -> list[str]:
    """The Linears of a plain LoRA, by the settings of a constrained one."""
    denoiser, layers = denoiser_of(pipeline), read_layers(settings.cross_attention_layers)
    scope = settle_scope(denoiser, settings.scope)
    if scope is None:
        return list(find_linears(denoiser, settings.features, layers))
    check_no_features(settings.features, layers)
    return scoped_linears(pipeline, scope).names


def free_constrained_weights(
    settings: NullSpaceSettings, denoiser: torch.nn.Module, statistics: FeatureStatistics
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Make the weights that have a statistic trainable; returns `{weight: projection}`."""
    statistics.check_same_models({"denoiser": fingerprint(denoiser)})
    check_widths(denoiser, statistics.widths)
    projections = null_space_cut(settings, statistics).projections()
    found, moved = {}, {}
    for name, projection in projections.items():
        weight = denoiser.get_submodule(name).weight
        weight.data = weight.data.float()
        weight.requires_grad_(True)
        # Linears with one input share a projection, which on a GPU is copied only once.
        found[weight] = moved.setdefault(id(projection), projection.to(weight.device))
    return found


def prepare_weights(
    settings: NullSpaceSettings, pipeline: DiffusionPipeline, statistics: FeatureStatistics | None
) -> Preparation:
    """Make the denoiser trainable in the way that the command line asks for."""
    denoiser = denoiser_of(pipeline)
    if settings.full_finetune:
        prepared = Preparation(free_constrained_weights(settings, denoiser, statistics), [])
    else:
        prepared = Preparation({}, add_lora(settings, pipeline, statistics))
    if settings.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return prepared


def keep_rule(settings: NullSpaceSettings) -> KeepRule:
    """What a checkpoint holds: the LoRA with its frozen A, or the trained weights."""
    return is_trainable if settings.full_finetune else lambda name, _: "lora_" in name


def training_schedule_of(
    settings: NullSpaceSettings, pipeline: DiffusionPipeline, size: tuple[int, int] | None = None
) -> Any:
    """The schedule of the training at its resolution or another size, of which flow matching has settings."""
    return schedule_of(
        pipeline,
        find_family(pipeline, "nullspace"),
        size or settings.resolution,
        num_inference_steps=settings.num_inference_steps,
        weighting_scheme=settings.weighting_scheme or WEIGHTING_SCHEMES[0],
    )


def schedules_by_size(settings: NullSpaceSettings, pipeline: DiffusionPipeline) -> dict[tuple[int, int], Any]:
    """Those of flow matching on the sizes of `--aspect_buckets`, by height and width of latents."""
    family = find_family(pipeline, "nullspace")
    sizes = own_sizes(settings, pipeline) if settings.aspect_buckets and family.flow_matching else []
    pixels = family.pixels_per_latent(pipeline)
    return {(size[0] // pixels, size[1] // pixels): training_schedule_of(settings, pipeline, size) for size in sizes}


def make_loss(
    settings: NullSpaceSettings,
    pipeline: DiffusionPipeline,
    accelerator: Accelerator,
    statistics: FeatureStatistics | None,
) -> Callable:
    """The denoising loss; class pictures are drawn first where they are missing."""
    guidance = GUIDANCE if settings.guidance_embedding is None else settings.guidance_embedding
    instance = encode_conditions(pipeline, subject_prompts(settings), guidance)
    latents = condition = None
    if settings.with_prior_preservation:
        # Under autocast, because weights that train are in float32 and the others may not be.
        with accelerator.main_process_first(), accelerator.autocast():
            paths = make_class_images(
                pipeline,
                settings.class_data_dir,
                settings.class_prompt,
                settings.num_class_images,
                batch_size=settings.train_batch_size,
                seed=settings.seed,
                resolution=settings.resolution,
                **sampling_arguments(settings),
            )
        crop = not settings.no_center_crop
        latents = encode_images(pipeline, paths, settings.resolution, center_crop=crop, flip=False)
        condition = encode_condition(pipeline, settings.class_prompt, guidance)
    scheduler = training_schedule_of(settings, pipeline)
    options = settings.prior_loss_weight, settings.snr_gamma, schedules_by_size(settings, pipeline)
    loss = DreamBoothLoss(scheduler, instance, latents, condition, *options)
    if settings.directions != "soft" or settings.full_finetune:
        return loss
    return SoftLoss(loss, statistics, settings.preservation_weight)


def save_result(
    settings: NullSpaceSettings, pipeline: DiffusionPipeline, statistics: FeatureStatistics | None, report: dict
) -> None:
    """Write the LoRA (or the pipeline), the statistics it was trained under, and the report."""
    denoiser = denoiser_of(pipeline)
    with staged_output(settings.output_dir, (LORA_WEIGHT_NAME, "model_index.json"), ON_THE_WAY) as folder:
        if settings.full_finetune:
            pipeline.save_pretrained(folder / "pipeline")
        else:
            save_lora(type(pipeline), denoiser, folder, metadata=_lora_facts(settings, pipeline))
        if statistics is not None:
            statistics.save_pretrained(folder / "statistics")
            if not settings.full_finetune:
                report["predicted_drift"] = predicted_drift(denoiser, statistics)
        (folder / "training_report.json").write_text(json.dumps(report, indent=2) + "\n")


def files_for_programs(settings: NullSpaceSettings) -> str:
    """Which of the files of a LoRA is for what, in one sentence."""
    file = Path(settings.output_dir, LORA_WEIGHT_NAME)
    for name, programs in ((KOHYA_NAME, "ComfyUI and A1111, which do"), (COMFYUI_NAME, "ComfyUI, which does")):
        if Path(settings.output_dir, name).is_file():
            return (
                f"{file} is for diffusers; {name} beside it is the same LoRA for {programs} not know the names in the "
                "first."
            )
    return f"{file} is for diffusers and for ComfyUI: its names are those of the model's transformer."


def _lora_facts(settings: NullSpaceSettings, pipeline: DiffusionPipeline) -> dict[str, str]:
    """What managers of LoRAs show; the base model by its Hub name, never by a path."""
    return training_metadata(
        instance_prompt=settings.instance_prompt,
        base_model=settings.hub_base_model or public_name(settings.pretrained_model_name_or_path),
        prediction_type=pipeline.scheduler.config.get("prediction_type"),
        resolution=settings.resolution,
        num_pictures=len(list_images(settings.instance_data_dir)),
        caption_counts=dict(Counter(picture_prompts(settings))),
    )


# Of the arguments, what a card shows.
_SHOWN = (
    "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler", "mixed_precision", "seed", "random_flip", "snr_gamma",
    "with_prior_preservation", "eps", "null_energy", "nullspace_threshold", "lora_dropout",
)  # fmt: skip


def subject_facts(
    settings: NullSpaceSettings,
    pipeline: DiffusionPipeline,
    statistics: FeatureStatistics | None = None,
    pictures: Sequence[Path] = (),
) -> dict[str, Any]:
    """What the card of a trained subject tells besides base model and licence, JSON-able.

    `pictures` are one per validation prompt, below the output folder.
    """
    facts = {
        "trained_on": _trained_on(settings, statistics),
        "settings": {name: vars(settings)[name] for name in _SHOWN if vars(settings)[name] is not None},
        "widget": widget_of(settings, settings.validation_prompt, pictures),
        "instance_prompt": settings.instance_prompt,
        "pipeline": plain_class_name(pipeline),
    }
    return facts if settings.full_finetune else {**facts, "directions": settings.directions}


def subject_card(
    settings: NullSpaceSettings,
    pipeline: DiffusionPipeline,
    statistics: FeatureStatistics | None = None,
    report: Mapping[str, Any] | None = None,
    pictures: Sequence[Path] = (),
) -> Callable[..., Card]:
    """The card of a trained subject but for the name of its repository; before the training there is no report.

    Raises `ValueError` where a fact is not known, such as the licence.
    """
    drifts = (report or {}).get("predicted_drift")
    family = find_family(pipeline, "nullspace")
    other = second_file([f"{family.denoiser}.blocks.lora_A.weight"], family)
    return make_card(
        "subject_pipeline" if settings.full_finetune else "null_space_lora",
        **subject_facts(settings, pipeline, statistics, pictures),
        **({} if settings.full_finetune else {"rank": settings.rank, "kohya_file": other}),
        results=measured_drift(drifts, statistics) if drifts else (),
        statistics=statistics is not None,
        **card_arguments(settings),
    )


def _trained_on(settings: NullSpaceSettings, statistics: FeatureStatistics | None) -> str:
    count = len(list_images(settings.instance_data_dir))
    pictures = "1 picture" if count == 1 else f"{count} pictures"
    area = f"{settings.resolution} x {settings.resolution} pixels"
    area = f"the area of {area}, near their own aspect ratios" if settings.aspect_buckets else area
    parts = [f"{pictures} of the subject at {area}."]
    if captions := read_captions(settings.instance_data_dir):
        parts.append(f"{len(captions)} of {count} were trained with captions of their own.")
    if settings.with_prior_preservation:
        parts.append(
            f"Beside them {settings.num_class_images} pictures of its class that the base model drew "
            "itself (prior preservation)."
        )
    if statistics is not None and statistics.facts["prompts"]:
        count = len(statistics.facts["prompts"])
        prompts = "1 prompt" if count == 1 else f"{count} prompts"
        parts.append(f"What the base model reads for {prompts} was preserved.")
    return " ".join(parts)


def publish(
    settings: NullSpaceSettings,
    pipeline: DiffusionPipeline,
    statistics: FeatureStatistics | None,
    report: Mapping[str, Any],
    pictures: Sequence[Path],
) -> str:
    """Upload the output folder of a training: weights, statistics, report, card, last pictures.

    Checkpoints, logs and the pictures that were trained on stay here. A pipeline comes to the root of the repository,
    where `from_pretrained` looks for it. Returns the address of the commit.
    """
    inputs = (settings.instance_data_dir, settings.class_data_dir)
    return push_output(
        settings,
        subject_card(settings, pipeline, statistics, report, pictures),
        ["class_*", *left_here(settings, *inputs)],
        at_root="pipeline" if settings.full_finetune else None,
    )


def directions_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the chosen directions of a LoRA hold, one clause per matrix of statistics."""
    parts = [
        f"{row['matrix']}: {row['rank']} for {row['linears']} layers, with "
        f"{row['instance_share']:.1%} of what is new in the subject's prompts and at least "
        f"{row['smallest_ratio']:.3g} times as much of it as of what is preserved"
        for row in rows
    ]
    return f"Chose the directions that may change ({'; '.join(parts)})."


def subject_words(settings: NullSpaceSettings, report: Mapping[str, Any], pictures: int) -> str:
    """What was learnt from how many `pictures`, how to load it and compare; the report is `training_report.json`'s."""
    taught = counted(pictures, "picture")
    learnt = f"Learnt {settings.instance_prompt!r} from {taught} in {steps_taken(settings, report)}."
    folder, drifts = Path(settings.output_dir), report.get("predicted_drift")
    if drifts:
        worst = max(drifts, key=drifts.get)
        learnt += (
            f" Kept what the statistics cover: on average over them the changed layers' outputs move by "
            f"at most {drifts[worst] ** 0.5:.2%} ({worst}), as predicted from the weights; nothing was "
            "drawn to measure it."
        )
    elif settings.full_finetune:
        learnt += " Only the null space of the statistics could change in the trained weights."
    else:
        learnt += " Nothing was constrained, so what the model knew may have changed."
    if settings.full_finetune:
        target = str(folder / "pipeline")
        load = f"DiffusionPipeline.from_pretrained({target!r})"
        return f"{learnt} Wrote {target}. Load it: {load}"
    compare = script_line(
        "evaluate_nullspace",
        pretrained_model_name_or_path=settings.pretrained_model_name_or_path,
        lora=settings.output_dir,
        knowledge_prompts=settings.knowledge_prompts or "PROMPTS_TO_KEEP.txt",
        subject_prompt=settings.instance_prompt,
        output_dir=folder / "evaluation",
    )
    return (
        f"{learnt} Wrote {folder}. Load it: pipe.load_lora_weights({str(folder)!r}). Compare with the "
        f"model as it was: {compare}"
    )
