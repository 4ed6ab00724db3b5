"""`custom_pipeline=` door to `NullSpaceDreamBoothXLPipeline`."""

from diffusers_ext.nullspace.pipeline import NullSpaceDreamBoothXLPipeline

__all__ = ["NullSpaceDreamBoothXLPipeline"]
