from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from diffusers_ext.training.run.checkpoint_files import random_states, read_state, restore_random_states, write_state

CPU = torch.device("cpu")
STATE = {
    "step": 3,
    "rates": (0.1, 1e-300, math.inf, -0.0),
    "state": {0: {"moment": torch.arange(6.0).reshape(2, 3).t(), "on": True, "none": None}},
    "runs": [[torch.tensor(2, dtype=torch.int64)], {"dict": "of that name"}, []],
}


def same(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        keys = list(first) == list(second)
        return keys and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        alike = type(first) is type(second) and len(first) == len(second)
        return alike and all(map(same, first, second))
    return type(first) is type(second) and repr(first) == repr(second)


def test_a_state_comes_back_to_the_bit(tmp_path):
    write_state(STATE, tmp_path / "part_0")
    assert {path.name for path in tmp_path.iterdir()} == {"part_0.json", "part_0.safetensors"}
    assert same(read_state(tmp_path / "part_0"), STATE)


def test_tensors_that_share_memory_come_back(tmp_path):
    tensor = torch.arange(4.0)
    write_state([tensor, tensor[1:], tensor], tmp_path / "a")
    assert same(read_state(tmp_path / "a"), [tensor, tensor[1:], tensor])


def test_what_only_a_pickle_could_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="numbers, texts, tensors, .* got a object"):
        write_state({"a": object()}, tmp_path / "a")


@pytest.mark.parametrize(
    "text", ["", "[", '{"tensor": "7"}', '{"code": "1"}', '{"dict": 1}', "{}", "[" * 100_000, '{"a": 1, "b": 2}']
)
def test_a_damaged_state_is_refused_by_name(tmp_path, text):
    write_state(STATE, tmp_path / "part_0")
    (tmp_path / "part_0.json").write_text(text)
    with pytest.raises(ValueError, match=r"part_0\.json must hold a state"):
        read_state(tmp_path / "part_0")


def test_a_missing_state_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"part_0\.json must be there"):
        read_state(tmp_path / "part_0")


def test_random_states_go_on(tmp_path):
    write_state(random_states(CPU), tmp_path / "r")
    drawn = (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
    restore_random_states(read_state(tmp_path / "r"), CPU, tmp_path / "r")
    assert (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()) == drawn


@pytest.mark.parametrize(
    ("name", "value"),
    [("python", None), ("python", (3, (1, 2), None)), ("numpy", ["MT19937", [1], 0, 0, 0.0]),
     ("torch", torch.zeros(3, dtype=torch.uint8)), ("torch", "x")],
)  # fmt: skip
def test_broken_random_states_stop_the_run(tmp_path, name, value):
    states = random_states(CPU)
    states[name] = value
    with pytest.raises(ValueError, match="r must hold the random states of this process"):
        restore_random_states(states, CPU, tmp_path / "r")
    del states[name]
    with pytest.raises(ValueError, match=f"no state of {name}"):
        restore_random_states(states, CPU, tmp_path / "r")
