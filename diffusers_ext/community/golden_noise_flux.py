"""`custom_pipeline=` door to `GoldenNoiseFluxPipeline`."""

from diffusers_ext.golden_noise.pipelines import GoldenNoiseFluxPipeline

__all__ = ["GoldenNoiseFluxPipeline"]
