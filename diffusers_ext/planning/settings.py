"""What runs are planned by: those settings of the training scripts that memory, disk and time depend on.

Nothing heavy is imported: the command line says what there is before it plans.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diffusers_ext.core.settings import (
    BELOW_ONE,
    COUNT,
    NOT_NEGATIVE,
    WITHOUT_IT,
    ModelSettings,
    ReportingSettings,
    Rule,
    SamplingSettings,
    Settings,
    TrainingSettings,
    as_in,
    at_least,
    setting,
)
from diffusers_ext.nullspace.settings import DIRECTIONS, RECOMBINATIONS, KnownModelSettings

LATENTS_SOURCES = ("trajectory", "video", "noise")
NETWORKS = ("golden_noise_model", "npnet", "transformer", "rnn")
SEQUENCE_NETWORKS = ("transformer", "rnn")
REWARDS = ("hpsv2", "pickscore", "clip_score")
TARGETS, OBJECTIVES = ("guidance", "reward", "best_of_n", "diversity"), ("pairs", "reward")
_NOISES_BY_REWARD = 8  # of a prompt, as `train_npnet.py --objective reward` has them


@dataclass(kw_only=True)
class PlannedRun(Settings):
    """What plans of all tools have."""

    max_train_steps: int | None = as_in(TrainingSettings, "max_train_steps", default=600)
    gradient_accumulation_steps: int = setting(1, "batches of a step", rule=COUNT)
    optimizer: str = as_in(TrainingSettings, "optimizer", default="adamw", help="of what trains; no package is needed")
    gradient_checkpointing: bool = as_in(TrainingSettings, "gradient_checkpointing", default=False)
    mixed_precision: str = as_in(ModelSettings, "mixed_precision", default="no", help="no, fp16 or bf16")
    num_inference_steps: int = as_in(SamplingSettings, "num_inference_steps", default=50)
    validation_steps: int | None = as_in(ReportingSettings, "validation_steps", default=None)
    checkpointing_steps: int | None = as_in(TrainingSettings, "checkpointing_steps", default=None)
    checkpoints_total_limit: int | None = as_in(TrainingSettings, "checkpoints_total_limit", default=None)

    @property
    def validations(self) -> int:
        """How often a run is validated."""
        return math.ceil(self.max_train_steps / (self.validation_steps or self.max_train_steps))

    @property
    def num_checkpoints(self) -> int:
        """How many a run leaves."""
        if self.checkpointing_steps is None:
            return 0
        written = self.max_train_steps // self.checkpointing_steps
        limit = self.checkpoints_total_limit
        return written if limit is None else min(written, limit)


@dataclass(kw_only=True)
class EraserPlanSettings(PlannedRun):
    """How an eraser is trained."""

    rank: int = setting(128, "inner width of each eraser", old_names=("eraser_rank",))
    kind: str = setting(
        "gelu", "gelu, or linear, which is a LoRA on the output projection", choices=("gelu", "linear")
    )
    num_frames: int | None = setting(None, f"of a clip; {WITHOUT_IT}")
    height: int | None = setting(None, f"of a clip; {WITHOUT_IT}")
    width: int | None = setting(None, f"of a clip; {WITHOUT_IT}")
    target_rows: int = setting(1, "clips of the concept at once", rule=NOT_NEGATIVE)
    preserved_rows: int = setting(1, "clips of what is kept at once", rule=NOT_NEGATIVE)
    separate_passes: bool = setting(
        False, "target rows, then preserved rows: less memory", old_names=("rows_in_turn",)
    )
    gradient_checkpointing: bool = as_in(TrainingSettings, "gradient_checkpointing", default=True)
    mixed_precision: str = as_in(PlannedRun, "mixed_precision", default="bf16")
    max_train_steps: int = as_in(PlannedRun, "max_train_steps", default=500)
    localization: bool = setting(False, "masks are made and used")
    latents_source: str = setting(
        "trajectory",
        "trajectory, video or noise; for the last two the teacher is asked in each step",
        choices=LATENTS_SOURCES,
    )
    num_target_trajectories: int = setting(16, "clips of the concept that the teacher samples", rule=COUNT)
    num_preserved_trajectories: int = setting(32, "clips of what is kept that it samples", rule=COUNT)
    points_per_trajectory: int = setting(16, "states kept of each; 0 keeps all", rule=NOT_NEGATIVE)
    sampling_batch_size: int = setting(1, "clips that the teacher samples at once", rule=COUNT)
    trajectories_dtype: str = setting("fp32", "fp32 or fp16, of the kept states", choices=("fp32", "fp16"))
    num_prompts: int = setting(64, "encoded in all", rule=COUNT)
    text_batch_size: int = setting(8, "prompts encoded at once", rule=COUNT)
    validation: bool = setting(False, "clips are decoded in the course of training")

    def settle(self) -> None:
        """All states where 0 are asked for, as the training has it."""
        self.points_per_trajectory = self.points_per_trajectory or self.num_inference_steps

    def check(self) -> None:
        """Also that anything trains."""
        super().check()
        if not self.target_rows + self.preserved_rows:
            raise ValueError("`target_rows` and `preserved_rows` must not both be 0.")


@dataclass(kw_only=True)
class NullSpacePlanSettings(PlannedRun):
    """How a subject is taught."""

    resolution: int | None = setting(None, f"pixels of a side; {WITHOUT_IT}")
    rank: int = setting(1, "of the LoRA", rule=COUNT)
    features: list[str] = setting(["k", "v"], "q k v out attn1.q ... ff.in ff.out")
    layers: str | list[int] = setting("all", "all, or indices", several=True)
    scope: str | None = setting(
        None, "of a joint-attention model: text_stream, which is the default, text_only or all"
    )
    directions: str = setting("generalized", "generalized, null, soft or plain", choices=DIRECTIONS)
    full_finetune: bool = setting(False, "whole weights in place of a LoRA")
    max_train_steps: int = as_in(PlannedRun, "max_train_steps", default=1000)
    train_batch_size: int = as_in(TrainingSettings, "train_batch_size", default=8, help="pictures of a batch")
    num_knowledge_prompts: int = setting(100, "preserved prompts", rule=COUNT)
    words_per_prompt: int = setting(6, "of each, for the phrases with one word left out", rule=COUNT)
    no_sub_phrases: bool = setting(False, "leave these and the recombinations out")
    statistics_batch_size: int = setting(4, "prompts of a denoising run", rule=COUNT)
    guidance_scale: float | None = as_in(KnownModelSettings, "guidance_scale", default=None, rule=None)
    num_instance_images: int = setting(5, "pictures of the subject", rule=COUNT)
    random_flip: bool = setting(False, "both ways round")
    with_prior_preservation: bool = setting(False, "pictures of the class are trained on, too")
    num_class_images: int = setting(100, "how many", rule=COUNT)
    num_validation_prompts: int = setting(0, "drawn in the course of training", rule=NOT_NEGATIVE)
    num_validation_images: int = setting(4, "of each", rule=COUNT)

    def check(self) -> None:
        """Also that whole weights train under projection."""
        super().check()
        if self.full_finetune and self.directions == "plain":
            raise ValueError(
                "`full_finetune` must come with statistics, got `directions` 'plain'. Whole weights "
                "train under projection only."
            )

    @property
    def num_texts(self) -> int:
        """Prompts that are encoded for the statistics, the empty one among them."""
        phrases = 1 if self.no_sub_phrases else 1 + self.words_per_prompt + RECOMBINATIONS
        return self.num_knowledge_prompts * phrases + 1

    @property
    def views(self) -> int:
        """Pictures of the subject with both ways round."""
        return self.num_instance_images * (2 if self.random_flip else 1)


@dataclass(kw_only=True)
class EditPlanSettings(Settings):
    """How much of a model's knowledge is edited, in one call."""

    num_edits: int = setting(1, "concepts", rule=COUNT)
    num_edited_prompts: int = setting(30, "prompts of each: templates, and preserved ones that name it", rule=COUNT)
    num_preserved_prompts: int = as_in(NullSpacePlanSettings, "num_knowledge_prompts", default=100)
    words_per_prompt: int = as_in(NullSpacePlanSettings, "words_per_prompt", default=6)
    no_sub_phrases: bool = as_in(NullSpacePlanSettings, "no_sub_phrases", default=False)
    batch_size: int = setting(64, "prompts read at once", rule=COUNT)
    rank: int = setting(32, "of the update, which an edit finds by itself", rule=COUNT)
    hard: bool = setting(False, "change nothing at all for the preserved prompts")
    mixed_precision: str = as_in(ModelSettings, "mixed_precision", default="no", help="no, fp16 or bf16")

    @property
    def num_texts(self) -> int:
        """Prompts that are encoded: targets and anchors, preserved ones with their parts, the empty one."""
        phrases = 1 if self.no_sub_phrases else 1 + self.words_per_prompt
        return 2 * self.num_edits * self.num_edited_prompts + self.num_preserved_prompts * phrases + 1


@dataclass(kw_only=True)
class GoldenNoisePlanSettings(PlannedRun):
    """How pairs are made and a network is trained on them.

    A reward that is not among `REWARDS` is not counted; without one no pictures are drawn.
    """

    output_size: int | None = setting(None, f"pixels of a side; {WITHOUT_IT}")
    num_prompts: int = setting(1000, "different prompts", rule=COUNT)
    noises_per_prompt: int = setting(1, "pairs tried for each", rule=COUNT)
    num_steps: int = setting(1, "golden noises of each; more than 1 makes sequences", rule=COUNT)
    target: str = setting("guidance", "where golden noise comes from", choices=TARGETS)
    w1: float = setting(5.5, "guidance of the step down")
    w2: float = setting(1.0, "guidance of the step up")
    ascent_steps: int = setting(10, "along the gradient, with the targets reward and diversity", rule=COUNT)
    gradient_steps: int | None = setting(
        None, "last denoising steps with the denoiser's gradient; all without it", rule=COUNT
    )
    best_of: int = setting(8, "noises to choose from, with the target best_of_n", rule=at_least(2))
    batch_size: int = setting(8, "pairs made at once", rule=COUNT)
    shard_size: int = setting(256, "pairs tried for one file", rule=COUNT)
    objective: str = setting("pairs", "what the network learns: pairs, or to raise a reward", choices=OBJECTIVES)
    reward: str | None = setting("hpsv2", "hpsv2, pickscore, clip_score, or none to keep all pairs")
    guidance_scale: float = as_in(SamplingSettings, "guidance_scale", default=7.5, rule=None)
    kept_share: float = setting(
        1.0, "of the pairs that the filter keeps", rule=Rule("in (0, 1]", lambda value: 0 < value <= 1)
    )
    network: str = setting("golden_noise_model", "golden_noise_model, npnet, transformer or rnn", choices=NETWORKS)
    structure: dict[str, Any] | None = setting(None, "fields of the network's config, as a JSON object")
    train_batch_size: int | None = setting(None, "pairs of a batch; what suits the network without it", rule=COUNT)
    max_train_steps: int | None = setting(None, "optimizer steps; those of the script's epochs without it", rule=COUNT)
    use_ema: bool = setting(False, "averaged weights are kept and saved")
    text_batch_size: int = setting(32, "prompts encoded at once for the training", rule=COUNT)
    text_cache_dtype: str = setting("fp16", "fp16 or fp32, of the kept embeddings", choices=("fp16", "fp32"))
    text_tokens: int | None = setting(
        None,
        "of a prompt where the model does not pad it, for its kept embeddings; the most it reads without",
        rule=COUNT,
    )
    validation_split: float = setting(0.05, "share of the prompts that is held out", rule=BELOW_ONE)
    num_validation_pairs: int = setting(256, "measured at most, of each side of the split", rule=COUNT)

    def check(self) -> None:
        """Also that there is something to train on; batch and steps are then the script's own."""
        super().check()
        self._check_reward()
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
        from diffusers_ext.golden_noise.networks.base import NETWORK_DEFAULTS

        usual = NETWORK_DEFAULTS[self.network]
        self.structure = self.structure or {}
        if self.train_batch_size is None:
            self.train_batch_size = usual["train_batch_size"]
        if self.max_train_steps is None:
            step = self.train_batch_size * self.gradient_accumulation_steps
            self.max_train_steps = math.ceil(self.training_pairs * usual["num_epochs"] / step)

    def _check_reward(self) -> None:
        needs = self.objective == "reward" or self.target in ("reward", "best_of_n")
        if needs and self.reward is None:
            raise ValueError("`reward` must be given for an objective or a target that asks one, got none.")
        if self.objective == "reward" and self.network in SEQUENCE_NETWORKS:
            raise ValueError(
                f"`objective` must be 'pairs' for the {self.network}, got 'reward'. Choose 'golden_noise_model' or "
                "'npnet', which learn by a reward."
            )

    @property
    def candidates(self) -> int:
        """Pairs that are tried; noises of the prompts where a network learns by the reward."""
        return self.num_prompts * (_NOISES_BY_REWARD if self.objective == "reward" else self.noises_per_prompt)

    @property
    def pairs(self) -> int:
        """Pairs that are kept."""
        return self.candidates if self.objective == "reward" else round(self.candidates * self.kept_share)

    @property
    def training_pairs(self) -> int:
        """Pairs that are not held out."""
        return self.pairs - round(self.pairs * self.validation_split)

    @property
    def validation_pairs(self) -> int:
        """Pairs that a validation measures, of both sides of the split together."""
        sides = (self.pairs - self.training_pairs, self.training_pairs)
        return sum(min(side, self.num_validation_pairs) for side in sides)


@dataclass(kw_only=True)
class GuardPlanSettings(PlannedRun):
    """How the gains of a network are measured and a guard is trained on them."""

    output_size: int | None = as_in(GoldenNoisePlanSettings, "output_size", default=None)
    num_prompts: int = as_in(GoldenNoisePlanSettings, "num_prompts", default=1000)
    noises_per_prompt: int = as_in(GoldenNoisePlanSettings, "noises_per_prompt", default=8, help="judged, of each")
    judged: bool = setting(False, "the pairs of generate_npd.py are learned from: no pictures are drawn")
    batch_size: int = as_in(GoldenNoisePlanSettings, "batch_size", default=8, help="noises judged at once")
    shard_size: int = as_in(GoldenNoisePlanSettings, "shard_size", default=256, help="noises judged for one file")
    reward: str | None = as_in(
        GoldenNoisePlanSettings, "reward", default="hpsv2", help="hpsv2, pickscore or clip_score"
    )
    guidance_scale: float = as_in(GoldenNoisePlanSettings, "guidance_scale", default=7.5)
    network: str = as_in(
        GoldenNoisePlanSettings, "network", default="golden_noise_model",
        help="that gets the guard: golden_noise_model, npnet, transformer or rnn",
    )  # fmt: skip
    num_steps: int = setting(1, "golden noises of a sequence network", rule=COUNT)
    structure: dict[str, Any] | None = as_in(GoldenNoisePlanSettings, "structure", default=None)
    train_batch_size: int = as_in(TrainingSettings, "train_batch_size", default=64, help="noises of a batch")
    text_batch_size: int = setting(32, "prompts encoded, and noises read, at once", rule=COUNT)
    text_cache_dtype: str = as_in(GoldenNoisePlanSettings, "text_cache_dtype", default="fp32")
    text_tokens: int | None = as_in(GoldenNoisePlanSettings, "text_tokens", default=None)
    validation_split: float = setting(
        0.2, "share of the prompts that is held out", rule=Rule("in (0, 1)", lambda value: 0 < value < 1)
    )
    reads: str = setting("prediction", "prediction of the model, or noise", choices=("prediction", "noise"))
    bands: int = setting(8, "lowest frequencies a side that the guard sees", rule=COUNT)
    patch_size: int = setting(2, "of them, a side of a patch", rule=COUNT)
    width: int = setting(64, "of its tokens", rule=COUNT)
    num_layers: int = setting(2, "of its transformer", rule=COUNT)
    num_heads: int = setting(4, "of its attention", rule=COUNT)

    def check(self) -> None:
        """Also that what judges is named."""
        super().check()
        if self.reward is None and not self.judged:
            raise ValueError(
                "`reward` must be given unless the noises are `judged`, got none. Name it, or pass `judged` for the "
                "pairs of generate_npd.py."
            )

    @property
    def pairs(self) -> int:
        """Noises that are judged, each in two pictures."""
        return self.num_prompts * self.noises_per_prompt

    @property
    def validation_pairs(self) -> int:
        """Those of held-out prompts."""
        return round(self.pairs * self.validation_split)
