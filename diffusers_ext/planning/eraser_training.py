"""Memory of an eraser's training before anything is downloaded or run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusers_ext.core.text_files import read_json
from diffusers_ext.eraser.component_memory import (
    text_encoder_memory,
    vae_memory,
)
from diffusers_ext.eraser.shaped_step import StepShape
from diffusers_ext.eraser.sizes import check_rank, transformer_width
from diffusers_ext.eraser.training_memory import meta_transformer, step_memory
from diffusers_ext.families.cogvideox import PUBLISHED_TRANSFORMERS, CogVideoX
from diffusers_ext.families.family import import_class
from diffusers_ext.families.published import T5_XXL
from diffusers_ext.families.registry import find_family


GIB = 2**30
LATENTS_SOURCES = ("trajectory", "video", "noise")
# Latents kept of a point, by part: x_t with v_concept and v_anchor, x_t with the velocity.
_KEPT_LATENTS = {"target": 3, "preserved": 2}


@dataclass(frozen=True)
class EraserSetting:
    """How an eraser is to be trained.

    Attributes:
        rank: of the eraser.
        num_frames, height, width: of the clips; the model's own when `None`.
        target_rows, preserved_rows: of one micro-step.
        rows_in_turn: target rows, then preserved rows go through the models.
        dtype: of the frozen models.
        gradient_checkpointing: blocks are computed again for their gradients.
        localization: masks are made and used.
        latents_source: `"trajectory"`, `"video"` or `"noise"`; the last two ask the teacher in each step.
        sampling_batch_size: clips that the teacher samples at once.
        target_points, preserved_points: states kept of all trajectories.
        storage_dtype: of these.
        text_batch_size: prompts encoded at once.
        validation: clips are decoded in the course of training.
    """

    rank: int = 128
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    target_rows: int = 1
    preserved_rows: int = 1
    rows_in_turn: bool = False
    dtype: torch.dtype = torch.bfloat16
    gradient_checkpointing: bool = True
    localization: bool = False
    latents_source: str = "trajectory"
    sampling_batch_size: int = 1
    target_points: int = 256
    preserved_points: int = 512
    storage_dtype: torch.dtype = torch.float32
    text_batch_size: int = 8
    validation: bool = False

    def __post_init__(self) -> None:
        if self.latents_source not in LATENTS_SOURCES:
            raise ValueError(
                f"`latents_source` must be one of {LATENTS_SOURCES}, got {self.latents_source!r}."
            )
        for name in ("sampling_batch_size", "text_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


class PipelineConfigs(NamedTuple):
    """Configs of the components that take memory."""

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]


@dataclass(frozen=True)
class EraserPlan:
    """Bytes that a training takes.

    Attributes:
        setting: what was asked for, the clip's size filled in.
        parts: by what takes them.
        phases: peak of each phase of the training script; the text encoder is gone after the first.
        samples: of the kept trajectories, on disk or in the host's memory.
    """

    setting: EraserSetting
    parts: dict[str, int]
    phases: dict[str, int]
    samples: int

    @property
    def peak(self) -> int:
        """Of the worst phase."""
        return max(self.phases.values())


def read_pipeline_configs(model: str | os.PathLike) -> PipelineConfigs:
    """Configs of a published CogVideoX by its name, or of a pipeline in a local folder.

    Args:
        model: such as `"CogVideoX-5b"` or `"zai-org/CogVideoX-5b"`, for which nothing is fetched, or a
            folder.

    Raises:
        ValueError: neither.
    """
    folder, names = Path(model), ("transformer", "vae", "text_encoder")
    if folder.is_dir():
        files = [folder / name / "config.json" for name in names]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise ValueError(
                f"`model` must be the folder of a pipeline, got one without {missing[0]}."
            )
        return PipelineConfigs(*(read_json(file) for file in files))
    published = {name.lower(): config for name, config in PUBLISHED_TRANSFORMERS.items()}
    config = published.get(str(model).rpartition("/")[2].lower())
    if config is None:
        raise ValueError(
            f"`model` must be a folder or one of {sorted(PUBLISHED_TRANSFORMERS)}, got {str(model)!r}. "
            "Download another model and name its folder."
        )
    return PipelineConfigs(config, {}, T5_XXL[1])


def plan_eraser_training(
    model: str | os.PathLike | PipelineConfigs,
    setting: EraserSetting | None = None,
    *,
    exact: bool = False,
) -> EraserPlan:
    """What a training takes, by part and by phase.

    Peaks are of tensors; a GPU needs about a GiB besides for its context and for fragmentation.

    Args:
        model: see `read_pipeline_configs`, or configs.
        setting: of the training; the default one when `None`.
        exact: trace all blocks of the transformer instead of a few.

    Raises:
        ValueError: an unknown model, a rank above its width, or clips that it cannot take.
    """
    setting = EraserSetting() if setting is None else setting
    configs = model if isinstance(model, PipelineConfigs) else read_pipeline_configs(model)
    check_rank(setting.rank, transformer_width(configs.transformer))
    setting, latents, text_length = fill_size(configs, setting)
    shape = step_shape(setting, latents)
    step = step_memory(configs.transformer, shape, exact=exact)
    text = text_encoder_memory(
        configs.text_encoder, setting.text_batch_size, text_length, setting.dtype
    )
    parts = {
        "transformer": step.transformer,
        "eraser": step.eraser,
        "gradients": step.eraser,
        "optimizer": step.optimizer,
        "student's activations": max(0, step.student - step.eraser),
        "teacher's pass": step.teacher,
        "text encoder": text.weights,
        "text encoder's activations": text.activations,
    }
    phases = {"text": text.weights + text.activations}
    if setting.latents_source == "trajectory":
        phases["sampling"] = step.transformer + step.teacher
    phases["training"] = step.training
    if setting.latents_source != "trajectory":
        phases["training"] = max(step.training, step.kept + step.teacher)
    _add_vae(configs, setting, step.kept, parts, phases)
    return EraserPlan(setting, parts, phases, _sample_bytes(setting, latents))


def fill_size(
    configs: PipelineConfigs, setting: EraserSetting
) -> tuple[EraserSetting, tuple[int, int, int, int], int]:
    """The setting with the clip's size, the shape of its latents, and the tokens of a prompt."""
    with torch.device("meta"):
        vae = import_class(CogVideoX.vae_class).from_config(dict(configs.vae))
    transformer = meta_transformer({**configs.transformer, "num_layers": 1})
    config, family = transformer.config, find_family(transformer, "eraser")
    own = family.clip_size(config, vae.config)
    given = (setting.num_frames, setting.height, setting.width)
    size = [side if chosen is None else chosen for chosen, side in zip(given, own)]
    shape = family.latent_shape(config, vae.config, *size)
    setting = replace(setting, num_frames=size[0], height=size[1], width=size[2])
    return setting, shape, family.text_length(config)


def step_shape(setting: EraserSetting, latents: tuple[int, int, int, int]) -> StepShape:
    """The training step of a setting whose clips have a size."""
    target, preserved = setting.target_rows, setting.preserved_rows
    # The teacher is asked for the concept's prompts, the anchor's, preserved ones and, for masks, the
    # empty one; in sampling for three at once.
    teacher = (3 if setting.localization else 2) * target + preserved
    if setting.latents_source == "trajectory":
        teacher = 3 * setting.sampling_batch_size
    elif setting.rows_in_turn:
        teacher = max(target, preserved)
    return StepShape(
        latents,
        rank=setting.rank,
        target_rows=target,
        preserved_rows=preserved,
        rows_in_turn=setting.rows_in_turn,
        teacher_rows=teacher,
        dtype=setting.dtype,
        gradient_checkpointing=setting.gradient_checkpointing,
        localization=setting.localization,
    )


def _add_vae(
    configs: PipelineConfigs,
    setting: EraserSetting,
    kept: int,
    parts: dict[str, int],
    phases: dict[str, int],
) -> None:
    """The VAE's part and phases, where it is used: it encodes videos, it decodes validation clips."""
    size = (setting.num_frames, setting.height, setting.width)
    uses = {"encoding": setting.latents_source == "video", "validation": setting.validation}
    for phase in (name for name, used in uses.items() if used):
        decodes = phase == "validation"
        vae = vae_memory(configs.vae, *size, setting.dtype, decodes=decodes)
        parts["VAE"] = vae.weights
        parts[f"VAE's {'decoding' if decodes else 'encoding'}"] = vae.activations
        others = kept if decodes else parts["transformer"]
        phases[phase] = others + vae.weights + vae.activations


def _sample_bytes(setting: EraserSetting, latents: tuple[int, int, int, int]) -> int:
    if setting.latents_source != "trajectory":
        return 0
    points = {"target": setting.target_points, "preserved": setting.preserved_points}
    count = sum(points[part] * number for part, number in _KEPT_LATENTS.items())
    return count * torch.Size(latents).numel() * setting.storage_dtype.itemsize
