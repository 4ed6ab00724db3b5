"""The base model of an eraser's training: what its configs tell, and the model without its text encoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from diffusers_ext.core.pictures import check_first_frames
from diffusers_ext.core.seeds import check_diffusion_levels, check_flow_levels
from diffusers_ext.eraser.concepts import check_concept
from diffusers_ext.eraser.recipe import AUTO_ANCHOR, EraserSettings
from diffusers_ext.families import families_of, find_family
from diffusers_ext.families.base_source import refuse_single_file
from diffusers_ext.families.family import Family, import_class
from diffusers_ext.hub.saved_pipelines import with_known_dtype
from diffusers_ext.training.eraser.data import ClipSize, FirstFrames
from diffusers_ext.training.run.base_model import read_components
from diffusers_ext.training.run.checkpoint_files import list_checkpoints
from diffusers_ext.training.run.setup import WEIGHT_DTYPES


@dataclass(frozen=True)
class BaseFacts:
    """What configs tell of a base model; they are read in no time, the weights in minutes."""

    transformer: SimpleNamespace  # with a `config` and no weights, as the VAE
    vae: SimpleNamespace
    tokenizer: PreTrainedTokenizerBase
    size: ClipSize  # of the clips to train on
    latent_shape: tuple[int, int, int, int]  # of these clips
    experts: tuple[str, ...]  # the transformers, each of which gets its part of the eraser


def read_base(settings: EraserSettings) -> BaseFacts:
    """Read the configs of `--pretrained_model_name_or_path`; raises `ValueError` where the arguments do not fit it."""
    family, components = read_video_family(settings), read_components(settings)
    source, revision = settings.pretrained_model_name_or_path, settings.revision
    denoiser, vae, scheduler = (
        SimpleNamespace(config=FrozenDict(model.load_config(source, subfolder=name, revision=revision)))
        for model, name in (
            (import_class(family.denoiser_class), family.denoiser),
            (import_class(family.vae_class), "vae"),
            (DDIMScheduler, "scheduler"),  # every scheduler's config reads alike
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(source, subfolder="tokenizer", revision=revision)
    _check_scheduler(family, scheduler.config)
    asked = {name: getattr(settings, name) for name in ClipSize._fields}
    size = ClipSize.of_configs(family, denoiser, vae, **asked)
    shape = family.latent_shape(denoiser.config, vae.config, *size)
    family.token_grid(denoiser.config, shape)
    _check_family(settings, family, denoiser.config)
    width = family.attention_width(denoiser.config)
    if settings.rank > width:
        raise ValueError(f"`eraser_rank` must be at most the model's width, {width}, got {settings.rank}.")
    anchor = None if settings.anchor_concept == AUTO_ANCHOR else settings.anchor_concept
    for concept in (settings.target_concept, anchor):
        if concept is not None:
            check_concept(tokenizer, concept)
    stand_in = SimpleNamespace(config=FrozenDict(components), scheduler=scheduler)
    return BaseFacts(denoiser, vae, tokenizer, size, shape, tuple(family.expert_timesteps(stand_in)))


def _check_family(settings: EraserSettings, family: Family, config: Any) -> None:
    """Raise `ValueError` for what a recipe asks and this model does not do."""
    reads_picture = bool(family.image_channels(config))
    drawn = bool(settings.validation_prompt) or settings.anchor_concept == AUTO_ANCHOR
    check_first_frames(settings.first_frames_dir, reads_picture, settings.latents_source != "video" or drawn)
    pictures = family.draws_pictures
    noised = not pictures and family.noises_clips
    more_than_tokens = bool({*family.text_fields} - {"prompt_embeds"})
    for name, asked, known, rule in (
        ("localization_weight", settings.localization_weight, family.locates_concepts, "0"),
        ("adversarial_share", settings.adversarial_share, family.locates_concepts, "0"),
        ("text_codebook_size", settings.text_codebook_size, family.locates_concepts, "None"),
        ("auto_preserved_concepts", settings.auto_preserved_concepts, family.locates_concepts, "False"),
        ("anchor_concept", settings.anchor_concept == AUTO_ANCHOR, not more_than_tokens, "a word or None"),
        ("latents_source", settings.latents_source != "trajectory", noised, "'trajectory'"),
    ):
        if asked and not known:
            kind = "image-to-video " if reads_picture else ""
            raise ValueError(
                f"`{name}` must be {rule} for {kind}{family.title}, for which nothing else is known, got "
                f"{getattr(settings, name)!r}."
            )


def read_first_frames(settings: EraserSettings, pipeline: DiffusionPipeline, size: ClipSize) -> FirstFrames | None:
    """The pictures of `--first_frames_dir`, where it is given."""
    if settings.first_frames_dir is None:
        return None
    return FirstFrames.read(pipeline, settings.first_frames_dir, size, seed=settings.seed)


def _check_scheduler(family: Family, config: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a scheduler of another kind of model."""
    predicts = config.get("prediction_type")
    if not family.flow_matching and predicts not in family.prediction_types:
        wanted = " or ".join(map(repr, family.prediction_types))
        raise ValueError(
            f"`prediction_type` of the scheduler must be {wanted}, as {family.title} has it, got {predicts!r}."
        )
    kind = getattr(diffusers, config["_class_name"], None)
    if kind is not None:  # one of another library is met when it is loaded
        check = check_flow_levels if family.flow_matching else check_diffusion_levels
        check(kind.from_config(config))


def read_video_family(settings: EraserSettings) -> Family:
    """The family of `--pretrained_model_name_or_path`; raises `ValueError` where no eraser is known for it."""
    source, known = settings.pretrained_model_name_or_path, families_of("eraser")
    names = {name: family for family in known for name in (family.pipelines[0], family.image_pipeline) if name}
    refuse_single_file(source, f"a {' or '.join(names)}")
    kind = read_components(settings)["_class_name"]
    if kind not in names:
        raise ValueError(f"`pretrained_model_name_or_path` must be a {' or '.join(names)}, got a {kind} in {source}.")
    return names[kind]


def load_base(settings: EraserSettings, device: torch.device) -> DiffusionPipeline:
    """The base model without its text encoder, frozen; the VAE, which videos and validation read, on the CPU."""
    arguments = {
        "revision": settings.revision,
        "variant": settings.variant,
        "dtype": WEIGHT_DTYPES[settings.mixed_precision],
        **{name: None for name in read_components(settings) if name.startswith("text_encoder")},
    }
    source = settings.pretrained_model_name_or_path
    pipeline = DiffusionPipeline.from_pretrained(source, **with_known_dtype(arguments))
    pipeline.vae.requires_grad_(False).eval()
    for name in find_family(pipeline, "eraser").expert_timesteps(pipeline):
        transformer = getattr(pipeline, name).requires_grad_(False).eval().to(device)
        if settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def settings_of_part(settings: EraserSettings, experts: Sequence[str], expert: str) -> EraserSettings:
    """The settings of one transformer's part: of several, each has checkpoints and samples in a folder of its name."""
    if len(experts) == 1:
        return settings
    part = copy.copy(settings)
    part.output_dir = str(Path(settings.output_dir, expert))
    if settings.trajectories_dir is not None:
        part.trajectories_dir = str(Path(settings.trajectories_dir, expert))
    if settings.resume_from_checkpoint is not None:
        if settings.resume_from_checkpoint != "latest":
            raise ValueError(
                "`resume_from_checkpoint` must be 'latest' for a model with several transformers, got "
                f"{settings.resume_from_checkpoint}."
            )
        part.resume_from_checkpoint = "latest" if list_checkpoints(part.output_dir) else None
    return part
