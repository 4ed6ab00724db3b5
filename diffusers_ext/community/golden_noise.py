"""`custom_pipeline=` door to `GoldenNoisePipeline`."""

from diffusers_ext.golden_noise.pipeline import GoldenNoisePipeline


__all__ = ["GoldenNoisePipeline"]
