"""Concept eraser for CogVideoX: adapter, losses, masks, trajectories, files."""

from typing import Any

from diffusers_ext.core.settings import by_name, imported_name

_SOURCES = by_name(
    {
        "diffusers_ext.eraser.adapter.config": "EraserConfig eraser_size",
        "diffusers_ext.eraser.adapter.layer": "EraserLayer",
        "diffusers_ext.eraser.adapter.model": "EraserModel register_eraser",
        "diffusers_ext.eraser.adapter.outputs": (
            "eraser_layers eraser_outputs erasers_disabled trainable_eraser_parameters"
        ),
        "diffusers_ext.eraser.concept_attention": "concept_attention",
        "diffusers_ext.eraser.concept_masks": ("concept_head_weights concept_mask normalize_attention velocity_mask"),
        "diffusers_ext.core.concept_words": "contains_concept replace_concept",
        "diffusers_ext.eraser.concepts": "concept_token_mask neighbouring_concepts",
        "diffusers_ext.eraser.files": "load_eraser convert_eraser save_eraser",
        "diffusers_ext.eraser.linear": "convert_eraser_to_lora merge_eraser unmerge_eraser",
        "diffusers_ext.eraser.losses": (
            "ConceptPreservationLoss MaskLocalizationLoss NegativelyGuidedVelocityLoss T2VUnlearningLoss"
        ),
        "diffusers_ext.eraser.text_codebook": (
            "attach_text_codebook detach_text_codebook learn_text_codebook replace_concept"
        ),
        "diffusers_ext.families.cogvideox": "CogVideoXVelocity",
    }
)
__all__ = sorted(_SOURCES)


def __getattr__(name: str) -> Any:
    return imported_name(__name__, _SOURCES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_SOURCES})
