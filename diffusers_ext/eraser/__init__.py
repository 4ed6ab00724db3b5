"""Concept eraser for CogVideoX: adapter, losses, masks, trajectories, files."""

from diffusers_ext.eraser.concept_attention import concept_attention
from diffusers_ext.eraser.concept_mask import concept_head_weights, concept_mask
from diffusers_ext.eraser.concepts import concept_token_mask, contains_concept, replace_concept
from diffusers_ext.eraser.config import EraserConfig
from diffusers_ext.eraser.format_change import convert_eraser
from diffusers_ext.eraser.layer import EraserLayer
from diffusers_ext.eraser.loading import load_eraser
from diffusers_ext.eraser.losses import (
    ConceptPreservationLoss,
    MaskLocalizationLoss,
    NegativelyGuidedVelocityLoss,
    T2VUnlearningLoss,
)
from diffusers_ext.eraser.masks import normalize_attention, velocity_mask
from diffusers_ext.eraser.model import EraserModel
from diffusers_ext.eraser.neighbours import neighbouring_concepts
from diffusers_ext.eraser.outputs import (
    eraser_layers,
    eraser_outputs,
    erasers_disabled,
    trainable_eraser_parameters,
)
from diffusers_ext.eraser.registration import register_eraser
from diffusers_ext.eraser.saving import save_eraser
from diffusers_ext.eraser.sizes import eraser_size
from diffusers_ext.eraser.velocity import CogVideoXVelocity


__all__ = [
    "CogVideoXVelocity",
    "ConceptPreservationLoss",
    "EraserConfig",
    "EraserLayer",
    "EraserModel",
    "MaskLocalizationLoss",
    "NegativelyGuidedVelocityLoss",
    "T2VUnlearningLoss",
    "concept_attention",
    "concept_head_weights",
    "concept_mask",
    "concept_token_mask",
    "contains_concept",
    "convert_eraser",
    "eraser_layers",
    "eraser_outputs",
    "eraser_size",
    "erasers_disabled",
    "load_eraser",
    "neighbouring_concepts",
    "normalize_attention",
    "register_eraser",
    "replace_concept",
    "save_eraser",
    "trainable_eraser_parameters",
    "velocity_mask",
]
