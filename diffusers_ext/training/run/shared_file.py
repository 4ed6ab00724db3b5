"""Which runs share one YAML file: names of another one of them are passed over there."""

from __future__ import annotations

from diffusers_ext.eraser.recipe import EraserSettings
from diffusers_ext.evaluation.settings import ErasureSettings, ForgettingSettings, GoldenNoiseEvaluationSettings
from diffusers_ext.golden_noise.settings import (
    GoldenSampleSettings,
    PairNetworkSettings,
    PairSettings,
    SequenceNetworkSettings,
)
from diffusers_ext.nullspace.settings import CollectionSettings, NullSpaceSettings

NULL_SPACE_RUNS = (NullSpaceSettings, CollectionSettings, ForgettingSettings)
GOLDEN_NOISE_RUNS = (
    PairSettings,
    PairNetworkSettings,
    SequenceNetworkSettings,
    GoldenSampleSettings,
    GoldenNoiseEvaluationSettings,
)
ERASER_RUNS = (EraserSettings, ErasureSettings)
