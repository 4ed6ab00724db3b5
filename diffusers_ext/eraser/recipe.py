"""What a training of an eraser is made with: one dataclass, for the script and for other callers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from diffusers_ext.eraser.velocity_losses import LOSS_TYPES


LATENTS_SOURCES = ("trajectory", "video", "noise")
_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class EraserTraining:
    """The recipe of an eraser; the defaults are those of the bundled moving-digits model.

    Attributes:
        rank: inner width of each eraser.
        guidance_scale: eta of the negative guidance, `v_anchor - eta (v_concept - v_anchor)`; 0 follows
            the anchor.
        unlearning_weight: of the distance to the negatively guided velocity.
        preservation_weight: of the distance to the teacher on preserved prompts.
        localization_weight: of what erasers add outside of the concept's region; 0 asks for no masks.
        loss_type: `"l2"` or `"l1"`, of both distances.
        learning_rate: of AdamW; real models need about 1e-4.
        lr_scheduler: name of a diffusers schedule of the rate, without warm-up.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to it.
        max_train_steps: optimizer steps.
        train_batch_size: samples of a step; each has a target row and a preserved row.
        rows_in_turn: target rows, then preserved rows go through the models: the memory of one kind
            for one more forward of the other; losses stay the same.
        gradient_accumulation_steps: batches of a step.
        preserved_share: of a step's rows; rows of the rarer kind are left out of the batch for it.
        empty_share: of the preserved rows, those of the empty prompt, which guidance needs.
        empty_weight: of these rows in the mean over preserved rows.
        min_timestep: rows below do not count.
        max_timestep: rows above do not count.
        mask_threshold: of the concept's mask; soft when `None`.
        latents_source: `"trajectory"`: x_t on the teacher's way to clips; `"video"`: noised latents of
            videos; `"noise"`: noised random numbers, which no sampler meets and which ruin clips.
        num_target_trajectories: clips sampled for target prompts.
        num_preserved_trajectories: clips sampled for preserved prompts.
        points_per_trajectory: states kept of each; all when `None`.
        num_inference_steps: of the teacher's sampling.
        sampling_guidance_scale: of the teacher's sampling.
        sampling_batch_size: clips sampled at once.
        on_policy_share: of a step's target rows, those whose x_t comes from the student's own sampling.
        on_policy_every: steps between two samplings by the student.
        adversarial_share: of a step's target rows, those whose prompts carry embeddings that were learned
            to bring the concept back.
        adversarial_every: steps between two attacks that learn them; the first one comes that late.
        adversarial_steps: of each attack.
        num_adversarial_embeddings: learned by each attack.
        num_adversarial_sets: of the latest attacks that are kept.
        seed: of everything random.
    """

    rank: int = 32
    guidance_scale: float = 0.5
    unlearning_weight: float = 1.0
    preservation_weight: float = 2.0
    localization_weight: float = 0.0
    loss_type: str = "l2"
    learning_rate: float = 5e-3
    lr_scheduler: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_train_steps: int = 500
    train_batch_size: int = 24
    rows_in_turn: bool = False
    gradient_accumulation_steps: int = 1
    preserved_share: float = 0.5
    empty_share: float = 0.2
    empty_weight: float = 1.0
    min_timestep: int = 0
    max_timestep: int = _TRAIN_TIMESTEPS - 1
    mask_threshold: float | None = None
    latents_source: str = "trajectory"
    num_target_trajectories: int = 64
    num_preserved_trajectories: int = 256
    points_per_trajectory: int | None = None
    num_inference_steps: int = 20
    sampling_guidance_scale: float = 3.0
    sampling_batch_size: int = 32
    on_policy_share: float = 0.0
    on_policy_every: int = 50
    adversarial_share: float = 0.0
    adversarial_every: int = 50
    adversarial_steps: int = 30
    num_adversarial_embeddings: int = 16
    num_adversarial_sets: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_recipe({field.name: getattr(self, field.name) for field in fields(self)})

    @property
    def weighs_rows(self) -> bool:
        """Whether some rows count more than others."""
        whole = (self.min_timestep, self.max_timestep) == (0, _TRAIN_TIMESTEPS - 1)
        return not whole or self.empty_weight != 1.0


def check_recipe(values: dict[str, Any]) -> None:
    """Raise `ValueError` for values that no recipe may have, by the names of `EraserTraining`."""
    counts = (
        "rank", "max_train_steps", "train_batch_size", "gradient_accumulation_steps",
        "num_target_trajectories", "num_preserved_trajectories", "points_per_trajectory",
        "num_inference_steps", "sampling_batch_size", "on_policy_every",
        "adversarial_every", "adversarial_steps", "num_adversarial_embeddings",
        "num_adversarial_sets",
    )  # fmt: skip
    _check(values, counts, "at least 1", lambda value: value >= 1)
    weights = (
        "guidance_scale", "unlearning_weight", "preservation_weight", "localization_weight",
        "weight_decay", "empty_weight", "sampling_guidance_scale",
    )  # fmt: skip
    _check(values, weights, "at least 0 and finite", lambda value: 0 <= value < math.inf)
    _check(values, ("learning_rate",), "positive", lambda value: 0 < value < math.inf)
    _check(values, ("max_grad_norm",), "positive", lambda value: value > 0)
    shares = ("preserved_share", "empty_share", "on_policy_share", "adversarial_share")
    _check(values, shares, "in [0, 1]", lambda value: 0 <= value <= 1)
    _check(values, ("mask_threshold",), "in (0, 1)", lambda value: 0 < value < 1)
    _check(values, ("loss_type",), f"one of {LOSS_TYPES}", lambda value: value in LOSS_TYPES)
    _check(
        values,
        ("latents_source",),
        f"one of {LATENTS_SOURCES}",
        lambda value: value in LATENTS_SOURCES,
    )
    terms = ("unlearning_weight", "preservation_weight", "localization_weight")
    if not any(values[name] for name in terms):
        raise ValueError(f"{terms} must not all be 0: nothing would be trained.")
    low, high = values["min_timestep"], values["max_timestep"]
    if not 0 <= low <= high < _TRAIN_TIMESTEPS:
        raise ValueError(
            "`min_timestep` and `max_timestep` must be from 0 to 999 and in order, got "
            f"{low} and {high}."
        )


def _check(values: dict[str, Any], names: tuple[str, ...], rule: str, holds: Any) -> None:
    for name in names:
        if values[name] is not None and not holds(values[name]):
            raise ValueError(f"`{name}` must be {rule}, got {values[name]}.")


# What the training script takes where the command line says nothing: pretrained models are larger by
# three orders of magnitude than the bundled one, and sampling one of their clips takes minutes.
REAL_MODEL_DEFAULTS: dict[str, Any] = {
    **asdict(EraserTraining()),
    "rank": 128,
    "learning_rate": 1e-4,
    "weight_decay": 1e-2,
    "max_train_steps": 500,
    "train_batch_size": 1,
    "num_target_trajectories": 16,
    "num_preserved_trajectories": 32,
    "points_per_trajectory": 16,
    "num_inference_steps": 50,
    "sampling_guidance_scale": 6.0,
    "sampling_batch_size": 1,
}
