"""The two ways to train a subject: a LoRA on chosen directions, or whole weights under projection."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from peft import LoraConfig

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.core.noise_schedules import training_schedule
from diffusers_ext.hub.licence import public_name
from diffusers_ext.nullspace.lora import (
    add_null_space_lora,
    lora_linears,
    predicted_drift,
    save_lora,
)
from diffusers_ext.nullspace.lora_files import KOHYA_NAME, LORA_WEIGHT_NAME
from diffusers_ext.nullspace.lora_metadata import training_metadata
from diffusers_ext.nullspace.projector import NullSpaceProjector
from diffusers_ext.nullspace.settings import NullSpaceSettings, read_layers
from diffusers_ext.nullspace.slots import check_widths, find_linears
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.nullspace.step import DreamBoothLoss, SoftLoss
from diffusers_ext.training.nullspace.captions import caption_counts, subject_prompts
from diffusers_ext.training.nullspace.pictures import (
    encode_condition,
    encode_conditions,
    encode_images,
    list_images,
    make_class_images,
    sampling_arguments,
)
from diffusers_ext.training.run.checkpoints import KeepRule, is_trainable
from diffusers_ext.training.run.script import ON_THE_WAY, staged_output


class Preparation(NamedTuple):
    """What makes a UNet trainable."""

    projections: dict[torch.nn.Parameter, torch.Tensor]  # of whole weights; empty with a LoRA
    report: list[dict]  # on the directions of a LoRA


def null_space_cut(args: NullSpaceSettings, statistics: FeatureStatistics) -> NullSpaceProjector:
    """The null spaces of `--null_energy` or `--nullspace_threshold`; 1e-3 of the energy by default."""
    if args.null_energy is None and args.nullspace_threshold is not None:
        return NullSpaceProjector.from_statistics(statistics, threshold=args.nullspace_threshold)
    energy = 1e-3 if args.null_energy is None else args.null_energy
    return NullSpaceProjector.from_statistics(statistics, energy=energy)


def add_plain_lora(
    args: NullSpaceSettings, pipeline: DiffusionPipeline, config: LoraConfig
) -> None:
    """An unconstrained LoRA on the same Linears, for comparison."""
    layers = read_layers(args.cross_attention_layers)
    # A list, because the order of a set of strings differs from process to process.
    config.target_modules = list(find_linears(pipeline.unet, args.features, layers))
    pipeline.unet.add_adapter(config)
    for _, layer in lora_linears(pipeline.unet):
        layer.lora_A.float()
        layer.lora_B.float()


def add_lora(
    args: NullSpaceSettings, pipeline: DiffusionPipeline, statistics: FeatureStatistics | None
) -> list[dict]:
    """Put the LoRA on the UNet; returns the report on its directions."""
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.rank,
        lora_dropout=args.lora_dropout,
        init_lora_weights="gaussian",
    )
    if statistics is None:
        add_plain_lora(args, pipeline, config)
        return []
    chosen = add_null_space_lora(
        pipeline.unet,
        statistics,
        instance_prompts=subject_prompts(args),
        pipeline=pipeline,
        rank=args.rank,
        directions=args.directions,
        eps=args.eps,
        projector=_asked_null_space(args, statistics),
        lora_config=config,
    )
    return [] if chosen is None else chosen.report()


def _asked_null_space(
    args: NullSpaceSettings, statistics: FeatureStatistics
) -> NullSpaceProjector | None:
    """The null spaces that flags ask for; without one the statistics and the subject decide."""
    asked = (args.null_energy, args.nullspace_threshold) != (None, None)
    return null_space_cut(args, statistics) if args.directions == "null" and asked else None


def free_constrained_weights(
    args: NullSpaceSettings, unet: torch.nn.Module, statistics: FeatureStatistics
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Make the weights that have a statistic trainable; returns `{weight: projection}`."""
    statistics.check_same_models({"denoiser": fingerprint(unet)})
    check_widths(unet, statistics.widths)
    projections = null_space_cut(args, statistics).projections()
    found, moved = {}, {}
    for name, projection in projections.items():
        weight = unet.get_submodule(name).weight
        weight.data = weight.data.float()
        weight.requires_grad_(True)
        # Linears with one input share a projection, which on a GPU is copied only once.
        found[weight] = moved.setdefault(id(projection), projection.to(weight.device))
    return found


def prepare_weights(
    args: NullSpaceSettings, pipeline: DiffusionPipeline, statistics: FeatureStatistics | None
) -> Preparation:
    """Make the UNet trainable in the way that the command line asks for."""
    if args.full_finetune:
        prepared = Preparation(free_constrained_weights(args, pipeline.unet, statistics), [])
    else:
        prepared = Preparation({}, add_lora(args, pipeline, statistics))
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    return prepared


def keep_rule(args: NullSpaceSettings) -> KeepRule:
    """What a checkpoint holds: the LoRA with its frozen A, or the trained weights."""
    return is_trainable if args.full_finetune else lambda name, _: "lora_" in name


def make_loss(
    args: NullSpaceSettings,
    pipeline: DiffusionPipeline,
    accelerator: Accelerator,
    statistics: FeatureStatistics | None,
) -> Callable:
    """The denoising loss; class pictures are drawn first where they are missing."""
    instance = encode_conditions(pipeline, subject_prompts(args), args.resolution)
    latents = condition = None
    if args.with_prior_preservation:
        # Under autocast, because weights that train are in float32 and the others may not be.
        with accelerator.main_process_first(), accelerator.autocast():
            paths = make_class_images(
                pipeline,
                args.class_data_dir,
                args.class_prompt,
                args.num_class_images,
                batch_size=args.train_batch_size,
                seed=args.seed,
                resolution=args.resolution,
                **sampling_arguments(args),
            )
        crop = not args.no_center_crop
        latents = encode_images(pipeline, paths, args.resolution, center_crop=crop, flip=False)
        condition = encode_condition(pipeline, args.class_prompt, args.resolution)
    scheduler = training_schedule(pipeline.scheduler)
    loss = DreamBoothLoss(
        scheduler, instance, latents, condition, args.prior_loss_weight, args.snr_gamma
    )
    if args.directions != "soft" or args.full_finetune:
        return loss
    return SoftLoss(loss, statistics, args.preservation_weight)


def save_result(
    args: NullSpaceSettings,
    pipeline: DiffusionPipeline,
    statistics: FeatureStatistics | None,
    report: dict,
) -> None:
    """Write the LoRA (or the pipeline), the statistics it was trained under, and the report."""
    with staged_output(
        args.output_dir, (LORA_WEIGHT_NAME, "model_index.json"), ON_THE_WAY
    ) as folder:
        if args.full_finetune:
            pipeline.save_pretrained(folder / "pipeline")
        else:
            save_lora(
                type(pipeline),
                pipeline.unet,
                folder,
                metadata=_lora_facts(args, pipeline),
            )
        if statistics is not None:
            statistics.save_pretrained(folder / "statistics")
            if not args.full_finetune:
                report["predicted_drift"] = predicted_drift(pipeline.unet, statistics)
        (folder / "training_report.json").write_text(json.dumps(report, indent=2) + "\n")


def files_for_programs(args: NullSpaceSettings) -> str:
    """Which of the two files of a LoRA is for what, in one sentence."""
    return (
        f"{Path(args.output_dir, LORA_WEIGHT_NAME)} is for diffusers; {KOHYA_NAME} beside it is the same "
        "LoRA for ComfyUI and A1111, which do not know the names in the first."
    )


def _lora_facts(args: NullSpaceSettings, pipeline: DiffusionPipeline) -> dict[str, str]:
    """What managers of LoRAs show; the base model by its Hub name, never by a path."""
    return training_metadata(
        instance_prompt=args.instance_prompt,
        base_model=args.hub_base_model or public_name(args.pretrained_model_name_or_path),
        prediction_type=pipeline.scheduler.config.get("prediction_type"),
        resolution=args.resolution,
        num_pictures=len(list_images(args.instance_data_dir)),
        caption_counts=caption_counts(args),
    )
