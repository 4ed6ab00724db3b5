from __future__ import annotations

import math

import pytest

from diffusers_ext.eraser.recipe import EraserTraining
from tests.eraser.real_model_defaults import REAL_MODEL_DEFAULTS


def test_the_defaults_of_real_models_are_a_recipe():
    recipe = EraserTraining(**REAL_MODEL_DEFAULTS)
    assert (recipe.rank, recipe.learning_rate) == (128, 1e-4)


@pytest.mark.parametrize(
    ("values", "weighs"), [({}, False), ({"min_timestep": 1}, True), ({"empty_weight": 2.0}, True)]
)
def test_rows_are_weighed_only_where_they_differ(values, weighs):
    assert EraserTraining(**values).weighs_rows is weighs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
        ({"num_target_trajectories": 0}, "`num_target_trajectories` must be at least 1, got 0"),
        ({"points_per_trajectory": 0}, "`points_per_trajectory` must be at least 1, got 0"),
        ({"sampling_batch_size": 0}, "`sampling_batch_size` must be at least 1, got 0"),
        ({"max_train_steps": 0}, "`max_train_steps` must be at least 1"),
        ({"negative_guidance": -1.0}, "`negative_guidance` must be at least 0"),
        ({"preservation_weight": math.nan}, "`preservation_weight` must be at least 0 and finite"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
        ({"empty_share": 1.5}, r"`empty_share` must be in \[0, 1\], got 1.5"),
        ({"mask_threshold": 1.0}, r"`mask_threshold` must be in \(0, 1\)"),
        ({"loss_type": "huber"}, "`loss_type` must be one of .*, got huber"),
        ({"latents_source": "random"}, "`latents_source` must be one of .*, got random"),
        ({"min_timestep": 9, "max_timestep": 3}, "must be from 0 to 999 and in order, got 9 and 3"),
        ({"unlearning_weight": 0.0, "preservation_weight": 0.0}, "must not all be 0"),
    ],
)
def test_values_that_no_recipe_may_have(values, message):
    with pytest.raises(ValueError, match=message):
        EraserTraining(**values)
