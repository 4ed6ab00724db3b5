"""How golden noise is made and learned, by the names of the training scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers_ext.planning.setting_checks import check_choice, check_counts, check_precision


NETWORKS = ("golden_noise_model", "npnet", "transformer", "rnn")
SEQUENCE_NETWORKS = ("transformer", "rnn")
REWARDS = ("hpsv2", "pickscore", "clip_score")
# What the training scripts take where nothing is given: pairs of a batch, and epochs.
USUAL_TRAINING = {
    "golden_noise_model": (32, 30),
    "npnet": (16, 30),
    "transformer": (8, 50),
    "rnn": (16, 50),
}
_COUNTS = (
    "num_prompts", "noises_per_prompt", "num_steps", "batch_size", "shard_size",
    "num_inference_steps", "train_batch_size", "max_train_steps", "gradient_accumulation_steps",
    "text_batch_size", "num_validation_pairs", "validation_steps", "checkpointing_steps",
    "checkpoints_total_limit",
)  # fmt: skip


@dataclass(frozen=True)
class GoldenNoiseSetting:
    """How pairs are made and a network is trained on them.

    Attributes:
        output_size: pixels of a side; the model's own when `None`.
        num_prompts: different prompts.
        noises_per_prompt: pairs tried for each.
        num_steps: golden noises of each; more than 1 makes sequences.
        w1, w2: guidance of the step down and of the step up.
        batch_size: pairs made at once; as many pictures of both noises are drawn at once.
        shard_size: pairs tried for one file.
        reward: `"hpsv2"`, `"pickscore"`, `"clip_score"`, the name of another one, which is not
            counted, or `None`: all pairs are kept, and no pictures are drawn.
        num_inference_steps, guidance_scale: of the pictures.
        kept_share: of the pairs that the filter keeps.
        network: `"golden_noise_model"`, `"npnet"`, `"transformer"` or `"rnn"`, the script's `--model`.
        structure: fields of the network's config.
        train_batch_size: pairs of a batch; what the script takes for the network when `None`.
        max_train_steps: optimizer steps; those of the script's epochs when `None`.
        gradient_accumulation_steps: batches of a step.
        gradient_checkpointing: blocks are computed again for their gradients.
        mixed_precision: `"no"`, `"fp16"` or `"bf16"`, of both scripts.
        use_ema: averaged weights are kept and saved.
        text_batch_size: prompts encoded at once for the training.
        text_cache_dtype: `"fp16"` or `"fp32"`, of the kept embeddings.
        validation_split: share of the prompts that is held out.
        num_validation_pairs: measured at most, of each side of the split.
        validation_steps: steps between two validations; only at the end when `None`.
        checkpointing_steps: steps between two checkpoints; none are written when `None`.
        checkpoints_total_limit: how many are kept; all when `None`.
    """

    output_size: int | None = None
    num_prompts: int = 1000
    noises_per_prompt: int = 1
    num_steps: int = 1
    w1: float = 5.5
    w2: float = 1.0
    batch_size: int = 8
    shard_size: int = 256
    reward: str | None = "hpsv2"
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    kept_share: float = 1.0
    network: str = "golden_noise_model"
    structure: Mapping[str, Any] = field(default_factory=dict)
    train_batch_size: int | None = None
    max_train_steps: int | None = None
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"
    use_ema: bool = False
    text_batch_size: int = 32
    text_cache_dtype: str = "fp16"
    validation_split: float = 0.05
    num_validation_pairs: int = 256
    validation_steps: int | None = None
    checkpointing_steps: int | None = None
    checkpoints_total_limit: int | None = None

    def __post_init__(self) -> None:
        check_precision(self.mixed_precision)
        check_counts(self, _COUNTS)
        check_choice("network", self.network, NETWORKS)
        check_choice("text_cache_dtype", self.text_cache_dtype, ("fp16", "fp32"))
        if not 0 < self.kept_share <= 1:
            raise ValueError(f"`kept_share` must be in (0, 1], got {self.kept_share}.")
        if not 0 <= self.validation_split < 1:
            raise ValueError(f"`validation_split` must be in [0, 1), got {self.validation_split}.")
        if self.network in SEQUENCE_NETWORKS and self.num_steps < 2:
            raise ValueError(
                f"`num_steps` must be at least 2 for the {self.network}, got {self.num_steps}. It learns "
                "sequences; choose 'golden_noise_model' or 'npnet' for pairs."
            )
        if self.training_pairs < 1:
            raise ValueError(
                "`kept_share` and `validation_split` must leave at least one pair to train on, got "
                f"{self.kept_share} and {self.validation_split} of {self.candidates} pairs."
            )
        self._fill_training()

    def _fill_training(self) -> None:
        """Batch and steps as the training script has them, where nothing is given."""
        batch, epochs = USUAL_TRAINING[self.network]
        if self.train_batch_size is None:
            object.__setattr__(self, "train_batch_size", batch)
        if self.max_train_steps is None:
            step = self.train_batch_size * self.gradient_accumulation_steps
            steps = math.ceil(self.training_pairs * epochs / step)
            object.__setattr__(self, "max_train_steps", steps)

    @property
    def candidates(self) -> int:
        """Pairs that are tried."""
        return self.num_prompts * self.noises_per_prompt

    @property
    def pairs(self) -> int:
        """Pairs that are kept."""
        return round(self.candidates * self.kept_share)

    @property
    def training_pairs(self) -> int:
        """Pairs that are not held out."""
        return self.pairs - round(self.pairs * self.validation_split)

    @property
    def validation_pairs(self) -> int:
        """Pairs that a validation measures, of both sides of the split together."""
        sides = (self.pairs - self.training_pairs, self.training_pairs)
        return sum(min(side, self.num_validation_pairs) for side in sides)
