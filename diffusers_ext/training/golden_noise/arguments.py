"""What the evaluation of golden noise shares with the training scripts: one YAML file, and a name in it."""

from __future__ import annotations

from typing import Any

from diffusers_ext.golden_noise.settings import (
    CandidateSettings,
    FilterSettings,
    GoldenSampleSettings,
    PairNetworkSettings,
    PairSettings,
    SequenceNetworkSettings,
)
from diffusers_ext.training.run.evaluation_names import add_golden_noise_names


GOLDEN_NOISE_GROUPS = (
    PairSettings,
    PairNetworkSettings,
    SequenceNetworkSettings,
    GoldenSampleSettings,
    add_golden_noise_names,
)


add_pair_arguments, add_filter_arguments = CandidateSettings, FilterSettings


def read_aliases(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a YAML file with `base_model_id` under its main name.

    `batch_size` is no alias there: in a file for all scripts it is that of generation and evaluation.

    Raises:
        ValueError: both names of the base model are given.
    """
    values, alias, name = dict(values), "base_model_id", "pretrained_model_name_or_path"
    if alias not in values:
        return values
    if name in values:
        raise ValueError(f"`{name}` must not stand beside its other name `{alias}`.")
    values[name] = values.pop(alias)
    return values


PAIR_GROUPS = (PairNetworkSettings,)
SEQUENCE_GROUPS = (SequenceNetworkSettings,)
