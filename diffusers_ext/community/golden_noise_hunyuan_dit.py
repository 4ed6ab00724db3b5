"""`custom_pipeline=` door to `GoldenNoiseHunyuanDiTPipeline`."""

from diffusers_ext.golden_noise.pipelines import GoldenNoiseHunyuanDiTPipeline

__all__ = ["GoldenNoiseHunyuanDiTPipeline"]
