"""How a subject is taught in the null space, by the names of the training scripts."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers_ext.nullspace.slots import check_features
from diffusers_ext.planning.setting_checks import check_choice, check_counts, check_precision


DIRECTIONS = ("generalized", "null", "soft", "plain")
_COUNTS = (
    "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "rank",
    "num_knowledge_prompts", "words_per_prompt", "statistics_batch_size", "num_inference_steps",
    "num_instance_images", "num_class_images", "num_validation_images", "validation_steps",
    "checkpointing_steps", "checkpoints_total_limit",
)  # fmt: skip


@dataclass(frozen=True)
class NullSpaceSetting:
    """How a subject is taught.

    Attributes:
        resolution: pixels of a side; the model's own when `None`.
        rank: of the LoRA.
        features: of the statistics and of the LoRA, as `collect_statistics` calls them.
        layers: `"all"`, or indices of transformer blocks.
        directions: `"generalized"`, `"null"`, `"soft"` or `"plain"`, which needs no statistics.
        full_finetune: whole weights train under projection, in place of a LoRA.
        max_train_steps: optimizer steps.
        train_batch_size: pictures of a batch.
        gradient_accumulation_steps: batches of a step.
        gradient_checkpointing: blocks are computed again for their gradients.
        mixed_precision: `"no"`, `"fp16"` or `"bf16"`.
        num_knowledge_prompts: preserved prompts.
        words_per_prompt: of each, for the phrases with one word left out.
        no_sub_phrases: leave these out.
        statistics_batch_size: prompts of a denoising run; text is encoded 16 times as many at once.
        num_inference_steps: of each picture, and of the denoising runs.
        guidance_scale: of them; above 1 it doubles the batch.
        num_instance_images: pictures of the subject.
        random_flip: both ways round.
        with_prior_preservation: pictures of the class are drawn and trained on, too.
        num_class_images: how many.
        num_validation_prompts: drawn in the course of training; 0 draws none.
        num_validation_images: of each.
        validation_steps: steps between two validations; only at the end when `None`.
        checkpointing_steps: steps between two checkpoints; none are written when `None`.
        checkpoints_total_limit: how many are kept; all when `None`.
    """

    resolution: int | None = None
    rank: int = 1
    features: tuple[str, ...] = ("k", "v")
    layers: str | tuple[int, ...] = "all"
    directions: str = "generalized"
    full_finetune: bool = False
    max_train_steps: int = 600
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"
    num_knowledge_prompts: int = 100
    words_per_prompt: int = 6
    no_sub_phrases: bool = False
    statistics_batch_size: int = 4
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    num_instance_images: int = 5
    random_flip: bool = False
    with_prior_preservation: bool = False
    num_class_images: int = 100
    num_validation_prompts: int = 0
    num_validation_images: int = 4
    validation_steps: int | None = None
    checkpointing_steps: int | None = None
    checkpoints_total_limit: int | None = None

    def __post_init__(self) -> None:
        check_precision(self.mixed_precision)
        check_counts(self, _COUNTS)
        check_counts(self, ["num_validation_prompts"], least=0)
        check_choice("directions", self.directions, DIRECTIONS)
        object.__setattr__(self, "features", check_features(self.features))
        if self.full_finetune and self.directions == "plain":
            raise ValueError(
                "`full_finetune` must come with statistics, got `directions` 'plain'. Whole weights "
                "train under projection only."
            )

    @property
    def num_texts(self) -> int:
        """Prompts that are encoded for the statistics, the empty one among them."""
        phrases = 1 if self.no_sub_phrases else 1 + self.words_per_prompt
        return self.num_knowledge_prompts * phrases + 1

    @property
    def views(self) -> int:
        """Pictures of the subject with both ways round."""
        return self.num_instance_images * (2 if self.random_flip else 1)

    @property
    def validations(self) -> int:
        """How often validation pictures are drawn."""
        if not self.num_validation_prompts:
            return 0
        steps = self.validation_steps or self.max_train_steps
        return -(-self.max_train_steps // steps)
