"""What an eraser is trained with: its recipe, and all settings of a training run.

`EraserTraining` has the defaults of the bundled moving-digits model; `EraserSettings`, which the training script
reads, those of pretrained models: they are larger by three orders of magnitude, and sampling one of their clips takes
minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from diffusers_ext.core.settings import (
    COUNT,
    SHARE,
    WITHOUT_IT,
    ModelSettings,
    ReportingSettings,
    Rule,
    Settings,
    TrainingRunSettings,
    TrainingSettings,
    as_in,
    required,
    setting,
)

AUTO_ANCHOR = "auto"
KINDS = ("gelu", "linear")  # of `EraserConfig`
LOSS_TYPES = ("l2", "l1")
LATENTS_SOURCES = ("trajectory", "video", "noise")
_TRAIN_TIMESTEPS = 1000
_WEIGHT = Rule("at least 0 and finite", lambda value: 0 <= value < math.inf)
_WORDS = Rule("a word or words", lambda value: bool(value.strip()))


@dataclass(kw_only=True)
class LatentsRecipe(Settings, title="latents"):
    """Where the noisy latents x_t come from."""

    latents_source: str = setting(
        "trajectory",
        "where noisy latents come from: the teacher's way to clips; noised latents of videos; noised "
        "random numbers, which no sampler meets and which ruin clips",
        rule=Rule(f"one of {LATENTS_SOURCES}", lambda value: value in LATENTS_SOURCES),
        choices=LATENTS_SOURCES,
    )
    num_target_trajectories: int = setting(64, "clips sampled for target prompts", rule=COUNT)
    num_preserved_trajectories: int = setting(256, "clips sampled for preserved prompts", rule=COUNT)
    points_per_trajectory: int | None = setting(None, "states kept of each clip's denoising; 0 keeps all", rule=COUNT)
    num_inference_steps: int = setting(20, "denoising steps of all sampling", rule=COUNT)
    sampling_guidance_scale: float = setting(3.0, "classifier-free guidance of all sampling", rule=_WEIGHT)
    sampling_batch_size: int = setting(32, "clips sampled at once", rule=COUNT)


@dataclass(kw_only=True)
class EraserTraining(LatentsRecipe, title="eraser"):
    """The recipe of an eraser, without base model, prompts and files."""

    rank: int = setting(32, "inner width of each eraser", flag="eraser_rank", rule=COUNT)
    kind: str = setting(
        "gelu",
        "gelu: a bottleneck with GELU beside each attention; linear: a LoRA on its output projection",
        rule=Rule(f"one of {KINDS}", lambda value: value in KINDS),
        choices=KINDS,
    )
    negative_guidance: float = setting(
        0.5,
        "eta of v_anchor - eta (v_concept - v_anchor): 0 follows the anchor, more leads past it",
        old_names=("guidance_scale",),
        rule=_WEIGHT,
    )
    unlearning_weight: float = setting(1.0, "of the distance to the negatively guided velocity", rule=_WEIGHT)
    preservation_weight: float = setting(2.0, "of the distance to the teacher on preserved prompts", rule=_WEIGHT)
    localization_weight: float = setting(
        0.0, "of what erasers add outside of the concept's region; 0 asks for no masks", rule=_WEIGHT
    )
    mask_threshold: float | None = setting(
        None,
        "attention from which a place is the concept's; soft masks without it",
        rule=Rule("in (0, 1)", lambda value: 0 < value < 1),
    )
    loss_type: str = setting(
        "l2",
        "of both distances",
        rule=Rule(f"one of {LOSS_TYPES}", lambda value: value in LOSS_TYPES),
        choices=LOSS_TYPES,
    )
    separate_passes: bool = setting(
        False,
        "target rows, then preserved rows go through the models: memory for one kind at a time, one more "
        "forward of the target rows, the same losses",
        old_names=("rows_in_turn",),
    )
    preserved_share: float = setting(
        0.5, "of a step's rows; the rarer kind is left out of the batch for it", rule=SHARE
    )
    empty_share: float = setting(0.2, "of preserved rows: the empty prompt, which guidance needs", rule=SHARE)
    empty_weight: float = setting(1.0, "of these rows in the mean over preserved rows", rule=_WEIGHT)
    min_timestep: int = setting(0, "rows below do not count")
    max_timestep: int = setting(_TRAIN_TIMESTEPS - 1, "rows above do not count")
    on_policy_share: float = setting(0.0, "of target rows: x_t from the student's own sampling", rule=SHARE)
    on_policy_every: int = setting(50, "steps between the student's samplings", rule=COUNT)
    adversarial_share: float = setting(
        0.0, "of target rows: prompts with embeddings learned to bring the concept back", rule=SHARE
    )
    adversarial_every: int = setting(
        50, "steps between the attacks that learn them; the first comes that late", rule=COUNT
    )
    adversarial_steps: int = setting(30, "of each attack", rule=COUNT)
    num_adversarial_embeddings: int = setting(16, "learned by each attack", rule=COUNT)
    num_adversarial_sets: int = setting(4, "of the latest attacks are kept", rule=COUNT)

    text_codebook_size: int | None = setting(
        None,
        "tokens of preserved prompts that all text is rounded to wherever the eraser works, beside as many of the "
        "target's that are read as the anchor's: learned embeddings say nothing new; text stays as it is without it",
        rule=COUNT,
    )
    learning_rate: float = as_in(TrainingSettings, "learning_rate", default=5e-3)
    lr_scheduler: str = as_in(TrainingSettings, "lr_scheduler", default="cosine")
    adam_weight_decay: float = as_in(
        TrainingSettings, "adam_weight_decay", default=0.0, rule=_WEIGHT, old_names=("weight_decay",)
    )
    max_grad_norm: float = as_in(TrainingSettings, "max_grad_norm", default=1.0)
    max_train_steps: int = as_in(TrainingSettings, "max_train_steps", default=500)
    train_batch_size: int = as_in(
        TrainingSettings,
        "train_batch_size",
        default=24,
        help="samples of a step in each process; each has a target row and a preserved row",
    )
    gradient_accumulation_steps: int = as_in(TrainingSettings, "gradient_accumulation_steps", default=1)
    seed: int = as_in(ModelSettings, "seed", default=0)

    def check(self) -> None:
        """Also what belongs together."""
        super().check()
        terms = ("unlearning_weight", "preservation_weight", "localization_weight")
        if not any(getattr(self, name) for name in terms):
            raise ValueError(f"{terms} must not all be 0: nothing would be trained.")
        low, high = self.min_timestep, self.max_timestep
        if not 0 <= low <= high < _TRAIN_TIMESTEPS:
            raise ValueError(
                f"`min_timestep` and `max_timestep` must be from 0 to 999 and in order, got {low} and {high}."
            )

    @property
    def timestep_range(self) -> tuple[float, float]:
        """`min_timestep` and `max_timestep`; no bound at the last, which flow matching passes by a fraction."""
        whole = self.max_timestep == _TRAIN_TIMESTEPS - 1
        return self.min_timestep, math.inf if whole else self.max_timestep

    @property
    def weighs_rows(self) -> bool:
        """Whether some rows count more than others."""
        whole = (self.min_timestep, self.max_timestep) == (0, _TRAIN_TIMESTEPS - 1)
        return not whole or self.empty_weight != 1.0

    def recipe(self) -> dict[str, Any]:
        """The values of the recipe alone, by name."""
        return {one.name: getattr(self, one.name) for one in fields(EraserTraining)}


@dataclass(kw_only=True)
class ConceptSettings(Settings, title="concept"):
    """What is erased, what takes its place, and what stays."""

    target_concept: str = required("word or words to erase", rule=_WORDS)
    anchor_concept: str | None = setting(
        None,
        "word in its place, or 'auto': the preserved concept that the model tells least from it; the empty "
        "prompt without it",
        rule=_WORDS,
    )
    prompts_file: str = required("prompts of the concept: text, one a line, or csv")
    prompt_column: str = setting("prompt", "of csv files")
    preserved_concepts_file: str | None = setting(None, "other concepts, one a line")
    auto_preserved_concepts: bool = setting(
        False, "take the text encoder's nearest words; they are shown and written to a file"
    )
    num_preserved_concepts: int = setting(15, "taken by itself", rule=COUNT)
    preserved_prompts_file: str | None = setting(None, "whole prompts to preserve besides")
    max_preserved_prompts: int | None = setting(None, "with a preserved concept", rule=COUNT)
    text_batch_size: int = setting(8, "prompts encoded at once", rule=COUNT)


@dataclass(kw_only=True)
class ClipSettings(Settings, title="latents"):
    """The clips of a run, and what is kept of them."""

    video_dir: str | None = setting(None, "folder of clips for --latents_source video")
    first_frames_dir: str | None = setting(
        None, "folder of pictures that the clips of an image-to-video model begin with, in turn"
    )
    num_frames: int | None = setting(None, WITHOUT_IT)
    height: int | None = setting(None, WITHOUT_IT)
    width: int | None = setting(None, WITHOUT_IT)
    trajectories_dir: str | None = setting(None, "keep the teacher's samples there")
    trajectories_dtype: str = setting("fp32", "of kept samples", choices=("fp32", "fp16"))


@dataclass(kw_only=True)
class ClipReportingSettings(ReportingSettings, title="reporting"):
    """Logs and validation clips."""

    validation_prompt: list[str] = setting([], "prompt of validation clips; may be repeated", repeated=True)
    num_validation_videos: int = setting(1, "validation clips of a prompt", rule=COUNT)
    validation_fps: int = setting(8, "frames a second of the gif files", rule=COUNT)


@dataclass(kw_only=True)
class EraserSettings(
    EraserTraining, ConceptSettings, ClipSettings, ClipReportingSettings, TrainingRunSettings,
):  # fmt: skip
    """How an eraser is trained from prompts; the defaults are those of pretrained models."""

    rank: int = as_in(EraserTraining, "rank", default=128)
    learning_rate: float = as_in(EraserTraining, "learning_rate", default=1e-4)
    adam_weight_decay: float = as_in(EraserTraining, "adam_weight_decay", default=1e-2)
    train_batch_size: int = as_in(EraserTraining, "train_batch_size", default=1)
    gradient_accumulation_steps: int | None = as_in(TrainingSettings, "gradient_accumulation_steps", default=None)
    num_target_trajectories: int = as_in(EraserTraining, "num_target_trajectories", default=16)
    num_preserved_trajectories: int = as_in(EraserTraining, "num_preserved_trajectories", default=32)
    points_per_trajectory: int | None = as_in(EraserTraining, "points_per_trajectory", default=16)
    num_inference_steps: int = as_in(EraserTraining, "num_inference_steps", default=50)
    sampling_guidance_scale: float = as_in(EraserTraining, "sampling_guidance_scale", default=6.0)
    sampling_batch_size: int = as_in(EraserTraining, "sampling_batch_size", default=1)

    def settle(self) -> None:
        """All points of a trajectory where 0 are asked for."""
        super().settle()
        self.points_per_trajectory = self.points_per_trajectory or None

    def check(self) -> None:
        """Also where latents come from, and that nothing is named twice."""
        super().check()
        source, folder = self.latents_source, self.video_dir
        if source == "video" and (folder is None or not Path(folder).is_dir()):
            raise ValueError(f"`video_dir` must be a folder of clips for `--latents_source video`, got {folder}.")
        if source != "trajectory" and self.trajectories_dir is not None:
            raise ValueError(
                f"`trajectories_dir` must not be given with `--latents_source {source}`, which samples "
                f"none, got {self.trajectories_dir}."
            )
        if self.preserved_concepts_file and self.auto_preserved_concepts:
            raise ValueError("`preserved_concepts_file` must not be given with `--auto_preserved_concepts`, got both.")

    def check_preserved(self) -> None:
        """Raise `ValueError` where nothing is named that the model must keep."""
        preserved = (
            self.preserved_concepts_file, self.preserved_prompts_file, self.auto_preserved_concepts
        )  # fmt: skip
        if (self.preservation_weight or self.text_codebook_size) and not any(preserved):
            raise ValueError(
                "One of `preserved_concepts_file`, `preserved_prompts_file` and `auto_preserved_concepts` must be "
                "given, got none. Name what the model must keep, or set `--preservation_weight 0` to keep nothing."
            )
