"""`custom_pipeline=` door to `GoldenNoiseSD3Pipeline`."""

from diffusers_ext.golden_noise.pipelines import GoldenNoiseSD3Pipeline

__all__ = ["GoldenNoiseSD3Pipeline"]
