"""`custom_pipeline=` door to `GoldenNoiseHunyuanDiTPipeline`."""

from diffusers_ext.golden_noise.pipeline_transformers import GoldenNoiseHunyuanDiTPipeline


__all__ = ["GoldenNoiseHunyuanDiTPipeline"]
