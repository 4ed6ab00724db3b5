"""`custom_pipeline=` door to `GoldenNoiseXLPipeline`."""

from diffusers_ext.golden_noise.pipelines import GoldenNoiseXLPipeline

__all__ = ["GoldenNoiseXLPipeline"]
