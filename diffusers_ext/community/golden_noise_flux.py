"""`custom_pipeline=` door to `GoldenNoiseFluxPipeline`."""

from diffusers_ext.golden_noise.pipeline_transformers import GoldenNoiseFluxPipeline


__all__ = ["GoldenNoiseFluxPipeline"]
