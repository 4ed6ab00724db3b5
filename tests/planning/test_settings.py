"""What is planned without being told otherwise is what the training does without being told otherwise."""

from __future__ import annotations

from dataclasses import fields

import pytest

from diffusers_ext.eraser.recipe import EraserSettings
from diffusers_ext.nullspace.settings import NullSpaceSettings
from diffusers_ext.planning.settings import (
    EraserPlanSettings,
    GoldenNoisePlanSettings,
    GuardPlanSettings,
    NullSpacePlanSettings,
)
from diffusers_ext.training.golden_noise.guard_settings import GuardTrainingSettings
from diffusers_ext.training.golden_noise.settings import NoiseSettings, PairSettings

# Without them accelerate's are taken, which a plan cannot know.
LAUNCHER = {"mixed_precision", "gradient_accumulation_steps"}


def defaults(settings_class):
    return {
        one.name: one.default_factory() if callable(one.default_factory) else one.default
        for one in fields(settings_class)
    }


@pytest.mark.parametrize(
    ("planned", "trained", "apart"),
    [
        (NullSpacePlanSettings, [NullSpaceSettings], set()),
        (GoldenNoisePlanSettings, [PairSettings, NoiseSettings], set()),
        (GuardPlanSettings, [GuardTrainingSettings], set()),
        # What fits the published models at all.
        (EraserPlanSettings, [EraserSettings], {"gradient_checkpointing"}),
    ],
)
def test_defaults_are_those_of_the_training(planned, trained, apart):
    expected = {name: default for each in trained for name, default in defaults(each).items()}
    found = {name: value for name, value in defaults(planned).items() if name in expected}
    assert len(found) >= 15
    differing = {name for name, value in found.items() if value != expected[name]}
    assert differing <= LAUNCHER | apart
