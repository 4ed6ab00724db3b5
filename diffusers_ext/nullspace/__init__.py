"""Null-space DreamBooth: teach a subject along directions that existing knowledge does not use."""

from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.debleed import debleed_lora, preserved_energy
from diffusers_ext.nullspace.directions import NullSpaceDirections, null_space_directions
from diffusers_ext.nullspace.lora import add_null_space_lora, predicted_drift, preservation_penalty, save_lora
from diffusers_ext.nullspace.lora_files import check_loaded_lora, export_lora, push_lora
from diffusers_ext.nullspace.pipeline import NullSpaceDreamBoothPipeline, NullSpaceDreamBoothXLPipeline
from diffusers_ext.nullspace.projector import NullSpaceProjector, ProjectedUpdate
from diffusers_ext.nullspace.statistics import FeatureStatistics

__all__ = [
    "FeatureStatistics",
    "NullSpaceDirections",
    "NullSpaceDreamBoothPipeline",
    "NullSpaceDreamBoothXLPipeline",
    "NullSpaceProjector",
    "ProjectedUpdate",
    "add_null_space_lora",
    "check_loaded_lora",
    "collect_statistics",
    "debleed_lora",
    "export_lora",
    "null_space_directions",
    "predicted_drift",
    "preservation_penalty",
    "preserved_energy",
    "push_lora",
    "save_lora",
]
