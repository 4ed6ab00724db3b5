from __future__ import annotations

import pytest

from diffusers_ext.nullspace.settings import NullSpaceSettings, read_layers

GIVEN = {
    "pretrained_model_name_or_path": "base", "output_dir": "out", "instance_data_dir": "pictures",
    "instance_prompt": "a photo of sks",
}  # fmt: skip


@pytest.mark.parametrize(
    ("value", "expected"), [("all", "all"), (["all"], "all"), (["0", "3"], [0, 3]), ([2, 1], [2, 1])]
)
def test_layers_are_all_or_indices(value, expected):
    assert read_layers(value) == expected


@pytest.mark.parametrize("value", ["most", ["mid"], ["0", "all"]])
def test_other_layers_are_refused(value):
    with pytest.raises(ValueError, match="`cross_attention_layers` must be 'all' or indices"):
        NullSpaceSettings(**GIVEN, cross_attention_layers=value)


@pytest.mark.parametrize(
    ("values", "rate"),
    [
        ({}, 3e-2),
        ({"directions": "soft"}, 1e-3),
        ({"enable": False}, 1e-3),
        ({"full_finetune": True}, 1e-4),
        ({"learning_rate": 0.5}, 0.5),
    ],
)
def test_the_rate_follows_the_directions(values, rate):
    assert NullSpaceSettings(**GIVEN, **values).learning_rate == rate


@pytest.mark.parametrize(
    ("values", "joint", "expected"),
    [
        ({}, True, (5e-2, "cosine")),
        ({}, False, (3e-2, "constant")),
        ({"learning_rate": 3e-2}, True, (3e-2, "constant")),
        ({"lr_scheduler": "constant"}, True, (3e-2, "constant")),
        ({"directions": "soft"}, True, (1e-3, "constant")),
        ({"full_finetune": True}, True, (1e-4, "constant")),
    ],
)
def test_rate_and_schedule_are_the_models_where_neither_is_given(values, joint, expected):
    settings = NullSpaceSettings(**GIVEN, **values)
    settings.settle_rate(joint=joint)
    settings.settle_rate(joint=not joint)  # is settled once
    assert (settings.learning_rate, settings.lr_scheduler) == expected
