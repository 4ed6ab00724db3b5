"""`custom_pipeline=` door to `GoldenNoisePipeline`."""

from diffusers_ext.golden_noise.pipelines import GoldenNoisePipeline

__all__ = ["GoldenNoisePipeline"]
