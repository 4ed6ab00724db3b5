"""`custom_pipeline=` door to `NullSpaceDreamBoothPipeline`."""

from diffusers_ext.nullspace.pipeline import NullSpaceDreamBoothPipeline

__all__ = ["NullSpaceDreamBoothPipeline"]
