"""The settings of all scripts of golden noise, which may share one YAML file."""

from diffusers_ext.golden_noise.settings import (
    GoldenSampleSettings,
    PairNetworkSettings,
    PairSettings,
    SequenceNetworkSettings,
)
from training.evaluation_names import add_golden_noise_names


GOLDEN_NOISE_GROUPS = (
    PairSettings,
    PairNetworkSettings,
    SequenceNetworkSettings,
    GoldenSampleSettings,
    add_golden_noise_names,
)
