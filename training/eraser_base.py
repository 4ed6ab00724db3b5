"""The CogVideoX model that an eraser is trained for: checks from its configs, text first, then the rest."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from diffusers_ext.core.base_source import refuse_single_file
from diffusers_ext.core.noise_schedules import check_diffusion_levels
from diffusers_ext.eraser.concepts import check_concept
from diffusers_ext.eraser.recipe import AUTO_ANCHOR, EraserSettings
from diffusers_ext.eraser.sizes import transformer_width
from diffusers_ext.families.family import Family, import_class
from diffusers_ext.families.registry import families_of
from training.eraser_data import ClipSize
from training.run_setup import WEIGHT_DTYPES
from training.text_pipeline import read_components


@dataclass(frozen=True)
class BaseFacts:
    """What configs tell of a base model; they are read in no time, the weights in minutes.

    Attributes:
        transformer, vae: with a `config` and no weights.
        tokenizer: of the text encoder.
        size: of the clips to train on.
        latent_shape: of these clips, `(frames, channels, height, width)`.
    """

    transformer: SimpleNamespace
    vae: SimpleNamespace
    tokenizer: PreTrainedTokenizerBase
    size: ClipSize
    latent_shape: tuple[int, int, int, int]


def read_base(args: EraserSettings) -> BaseFacts:
    """Read the configs of `--pretrained_model_name_or_path` and check the arguments against them.

    Raises:
        ValueError: no CogVideoX text-to-video pipeline, clips that it cannot take, a rank above its
            width, a scheduler of another prediction, or a concept that its tokenizer cannot spell.
    """
    family = read_video_family(args)
    source, revision = args.pretrained_model_name_or_path, args.revision
    transformer, vae, scheduler = (
        SimpleNamespace(
            config=FrozenDict(model.load_config(source, subfolder=name, revision=revision))
        )
        for model, name in (
            (import_class(family.denoiser_class), "transformer"),
            (import_class(family.vae_class), "vae"),
            (DDIMScheduler, "scheduler"),  # every scheduler's config reads alike
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(source, subfolder="tokenizer", revision=revision)
    predicts = scheduler.config.get("prediction_type")
    if predicts != "v_prediction":
        raise ValueError(
            f"`prediction_type` of the scheduler must be 'v_prediction', as {family.title} has it, got "
            f"{predicts!r}."
        )
    kind = getattr(diffusers, scheduler.config["_class_name"], None)
    if kind is not None:  # one of another library is met when it is loaded
        check_diffusion_levels(kind.from_config(scheduler.config))
    size = ClipSize.of_configs(family, transformer, vae, args.num_frames, args.height, args.width)
    shape = family.latent_shape(transformer.config, vae.config, *size)
    family.token_grid(transformer.config, shape)
    width = transformer_width(transformer.config)
    if args.rank > width:
        raise ValueError(
            f"`eraser_rank` must be at most the model's width, {width}, got {args.rank}."
        )
    anchor = None if args.anchor_concept == AUTO_ANCHOR else args.anchor_concept
    for concept in (args.target_concept, anchor):
        if concept is not None:
            check_concept(tokenizer, concept)
    return BaseFacts(transformer, vae, tokenizer, size, shape)


def read_video_family(args: EraserSettings) -> Family:
    """The family of `--pretrained_model_name_or_path`, which must be one that an eraser is known for.

    Raises:
        ValueError: a single file, or another pipeline.
    """
    source, known = args.pretrained_model_name_or_path, families_of("eraser")
    names = {family.pipelines[0]: family for family in known}
    refuse_single_file(source, f"a {' or '.join(names)}")
    kind = read_components(args)["_class_name"]
    if kind not in names:
        raise ValueError(
            f"`pretrained_model_name_or_path` must be a {' or '.join(names)}, got a {kind} in {source}."
        )
    return names[kind]


def load_base(args: EraserSettings, device: torch.device) -> DiffusionPipeline:
    """The base model without its text encoder, frozen, in the dtype of `--mixed_precision`.

    The VAE stays on the CPU: only videos and validation clips need it.
    """
    pipeline = DiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        dtype=WEIGHT_DTYPES[args.mixed_precision],
        text_encoder=None,
    )
    for model in (pipeline.transformer, pipeline.vae):
        model.requires_grad_(False).eval()
    pipeline.transformer.to(device)
    if args.gradient_checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
