"""The kinds of artifacts that have a card, and what the cards of each have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Kind:
    """What all cards of one kind share.

    Attributes:
        template: file in `hub_cards/templates`, without its ending.
        tags: of the header.
        pipeline_tag: the Hub's task; `None` for what is no model.
        library_name: the library whose loaders read it.
        relation: to the base model; `None` where the Hub knows none.
        facts: what a card of this kind must be given besides what every card needs.
        papers: keys of `hub_cards.citations.PAPERS`.
        may_be_empty: those of `facts` that may be `None` or empty words.
        repo_type: of the repository.
    """

    template: str
    tags: tuple[str, ...]
    pipeline_tag: str | None
    library_name: str | None
    relation: str | None
    facts: tuple[str, ...]
    papers: tuple[str, ...]
    may_be_empty: tuple[str, ...] = ()
    repo_type: Literal["model", "dataset"] = "model"


_NULL_SPACE_PAPERS = ("dreambooth", "alphaedit", "inflora")
_NETWORK_FACTS = (
    "network", "pipeline", "parameters", "latent_shape", "any_size", "text_embed_dim",
)  # fmt: skip


def _network(tag: str, template: str) -> Kind:
    return Kind(
        template=template,
        tags=("diffusers", "diffusers-training", "golden-noise", tag),
        pipeline_tag="text-to-image",
        library_name="diffusers",
        relation="adapter",
        facts=_NETWORK_FACTS,
        papers=("golden_noise",),
    )


KINDS: dict[str, Kind] = {
    "null_space_lora": Kind(
        template="null_space_lora",
        tags=("diffusers", "diffusers-training", "lora", "dreambooth", "template:sd-lora"),
        pipeline_tag="text-to-image",
        library_name="diffusers",
        relation="adapter",
        facts=("instance_prompt", "pipeline", "directions", "rank", "statistics", "kohya_file"),
        papers=_NULL_SPACE_PAPERS,
        may_be_empty=("kohya_file",),
    ),
    "subject_pipeline": Kind(
        template="subject_pipeline",
        tags=("diffusers", "diffusers-training", "dreambooth", "null-space-dreambooth"),
        pipeline_tag="text-to-image",
        library_name="diffusers",
        relation="finetune",
        facts=("instance_prompt", "pipeline", "statistics"),
        papers=_NULL_SPACE_PAPERS,
        may_be_empty=("instance_prompt",),
    ),
    "feature_statistics": Kind(
        template="feature_statistics",
        tags=("diffusers", "feature-statistics", "null-space-dreambooth"),
        pipeline_tag=None,
        library_name="diffusers",
        relation="adapter",
        facts=("pipeline", "num_prompts", "example_prompts", "layers", "megabytes"),
        papers=_NULL_SPACE_PAPERS,
    ),
    "npnet": _network("npnet", "npnet"),
    "golden_noise_model": _network("golden-noise-model", "golden_noise_model"),
    "noise_sequence_transformer": _network(
        "noise-sequence-transformer", "noise_sequence_transformer"
    ),
    "noise_sequence_rnn": _network("noise-sequence-rnn", "noise_sequence_rnn"),
    "golden_noise_pipeline": Kind(
        template="golden_noise_pipeline",
        tags=("diffusers", "golden-noise"),
        pipeline_tag="text-to-image",
        library_name="diffusers",
        relation="adapter",
        facts=("pipeline", "plain_pipeline", "network", "parameters"),
        papers=("golden_noise",),
        may_be_empty=("network",),
    ),
    "eraser": Kind(
        template="eraser",
        tags=("diffusers", "diffusers-training", "peft", "concept-erasure", "eraser", "cogvideox"),
        pipeline_tag="text-to-video",
        library_name="diffusers",
        relation="adapter",
        facts=(
            "concept", "anchor_concept", "preserved_concepts", "pipeline", "rank", "parameters",
        ),
        papers=("t2vunlearning", "receler"),
        may_be_empty=("anchor_concept",),
    ),
    "pair_data_set": Kind(
        template="pair_data_set",
        tags=("diffusers", "golden-noise"),
        pipeline_tag=None,
        library_name=None,
        relation=None,
        facts=("num_pairs", "num_rejected", "num_steps", "latent_shape", "pipeline", "reward"),
        papers=("golden_noise",),
        may_be_empty=("reward",),
        repo_type="dataset",
    ),
}  # fmt: skip
