from __future__ import annotations

import argparse

import pytest

from training import build_covariance, evaluate_nullspace, train_nullspace_dreambooth
from training.arguments import NULL_SPACE_GROUPS, add_model_arguments, argument_names, read_layers


SCRIPTS = (build_covariance, evaluate_nullspace, train_nullspace_dreambooth)
LOOP_FLAGS = {"learning_rate", "max_train_steps", "train_batch_size", "lr_scheduler", "rank"}
MODEL_FLAGS = {"config", "pretrained_model_name_or_path", "output_dir", "seed", "mixed_precision"}


def flags_of(script, monkeypatch) -> set[str]:
    """Names of the arguments that a script's parser has."""
    found: list[argparse.ArgumentParser] = []

    def keep(parser, *_):
        found.append(parser)
        raise InterruptedError

    monkeypatch.setattr(script, "parse_arguments", keep)
    with pytest.raises(InterruptedError):
        script.parse_args([])
    return {action.dest for action in found[0]._actions} - {"help"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_have_only_arguments_of_the_shared_groups(script, monkeypatch):
    flags = flags_of(script, monkeypatch)
    assert flags <= argument_names(NULL_SPACE_GROUPS)
    assert flags >= MODEL_FLAGS | {"knowledge_prompts", "num_inference_steps", "guidance_scale"}


def test_only_the_training_script_has_a_loop(monkeypatch):
    assert LOOP_FLAGS <= flags_of(train_nullspace_dreambooth, monkeypatch)
    for script in (build_covariance, evaluate_nullspace):
        flags = flags_of(script, monkeypatch)
        assert not flags & LOOP_FLAGS
        assert "report_to" not in flags
    assert "hub_model_id" in flags_of(build_covariance, monkeypatch)


def test_argument_names_are_those_of_the_groups():
    assert MODEL_FLAGS < argument_names([add_model_arguments])
    assert "help" not in argument_names(NULL_SPACE_GROUPS)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("all", "all"), (["all"], "all"), (["0", "3"], [0, 3]), ([2, 1], [2, 1])],
)
def test_layers_are_all_or_indices(value, expected):
    assert read_layers(value) == expected


@pytest.mark.parametrize("value", ["most", ["mid"], ["0", "all"]])
def test_other_layers_are_refused(value):
    with pytest.raises(ValueError, match="`cross_attention_layers` must be 'all' or indices"):
        read_layers(value)
