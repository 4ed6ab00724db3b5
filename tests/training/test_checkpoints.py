from __future__ import annotations

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from diffusers_ext.training.run import checkpoint_files as checkpoint_folders
from diffusers_ext.training.run.checkpoint_files import (
    check_same_facts,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
)
from diffusers_ext.training.run.checkpoints import Checkpoints

FACTS = {"seed": 0, "model": {"probe": [1.0, 2.0]}}


@pytest.fixture(autouse=True)
def _fresh(fresh_accelerator):
    pass


class Run:
    """A model and an optimizer whose checkpoints are looked at."""

    def __init__(self, folder, facts=FACTS, **arguments):
        self.accelerator = Accelerator(cpu=True)
        self.checkpoints = Checkpoints(self.accelerator, folder, facts, **arguments)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        model[0].bias.requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def step(self) -> None:
        self.model(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_brings_back_weights_optimizer_and_random_states(tmp_path):
    run = Run(tmp_path)
    run.step()
    run.checkpoints.save(1)
    saved = run.weights()
    following = torch.randn(3)
    run.step()
    expected = run.weights()
    other = Run(tmp_path)
    assert other.checkpoints.resume("latest") == 1
    assert torch.equal(torch.randn(3), following)
    assert all(torch.equal(a, b) for a, b in zip(other.weights(), saved))
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(other.weights(), expected))


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(None, {"0.weight", "1.weight", "1.bias"}), (lambda name, _: name.startswith("0"), {"0.weight", "0.bias"})],
)
def test_only_what_is_kept_is_written(tmp_path, keep, expected):
    run = Run(tmp_path, **({} if keep is None else {"keep": keep}))
    run.checkpoints.save(3)
    assert load_file(tmp_path / "checkpoint-3" / "trained_0.safetensors").keys() == expected
    assert not any("model" in name for name in names(tmp_path / "checkpoint-3"))


def test_other_parameters_than_the_trained_ones_are_refused(tmp_path):
    Run(tmp_path).checkpoints.save(1)
    other = Run(tmp_path)
    other.model[1].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="must hold the trained parameters .* differs in .*1.bias"):
        other.checkpoints.resume("latest")


def test_the_newest_are_kept_in_order_of_their_steps(tmp_path):
    run = Run(tmp_path, total_limit=2)
    for step in (8, 9, 10):
        run.checkpoints.save(step)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-9"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-10"
    run.checkpoints.save(10)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-9"]


def test_folders_that_are_no_checkpoints_are_passed_over(tmp_path):
    run = Run(tmp_path)
    run.checkpoints.save(2)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-2-backup")
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / ".partial-checkpoint-4")
    (tmp_path / "checkpoint-6").mkdir()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert Run(tmp_path).checkpoints.resume("latest") == 2
    assert ".partial-checkpoint-4" not in names(tmp_path)


def test_a_failed_save_leaves_the_earlier_checkpoints(tmp_path, monkeypatch):
    run = Run(tmp_path, total_limit=1)
    run.checkpoints.save(1)

    def fail(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint_folders, "flush_folder", fail)
    with pytest.raises(OSError, match="No space left"):
        run.checkpoints.save(2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert Run(tmp_path).checkpoints.resume("latest") == 1


def test_a_checkpoint_that_is_half_removed_has_lost_its_name(tmp_path, monkeypatch):
    run = Run(tmp_path, total_limit=1)
    run.checkpoints.save(1)

    def fail(folder, ignore_errors=False):
        if folder.exists():
            next(folder.iterdir()).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_folders.shutil, "rmtree", fail)
    with pytest.raises(KeyboardInterrupt):
        run.checkpoints.save(2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-2"]


@pytest.mark.parametrize("damage", ["truncate", "alter", "remove"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    Run(tmp_path).checkpoints.save(1)
    path = tmp_path / "checkpoint-1" / "random_states_0.safetensors"
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        half = len(content) // 2
        changed = content[:half] if damage == "truncate" else content[:half] + b"x" + content[half + 1 :]
        path.write_bytes(changed)
    with pytest.raises(ValueError, match="whole checkpoint.* random_states_0.safetensors is (missing|truncated)"):
        Run(tmp_path).checkpoints.resume("latest")


@pytest.mark.parametrize(
    "change",
    [{"step": 2}, {"step": "1"}, {"fingerprint": {}}, {"sha256": None}, {"sha256": ""}, {"files": {}}, {"files": []}],
)
def test_an_altered_run_file_is_refused(tmp_path, change):
    Run(tmp_path).checkpoints.save(1)
    path = tmp_path / "checkpoint-1" / "run.json"
    run = json.loads(path.read_text())
    path.write_text(json.dumps({**run, **change}))
    with pytest.raises(ValueError, match=r"run\.json must hold .* it was altered"):
        Run(tmp_path).checkpoints.resume("latest")
    path.write_text(json.dumps(run)[:-9])
    with pytest.raises(ValueError, match=r"run\.json must hold JSON"):
        Run(tmp_path).checkpoints.resume("latest")


def test_a_checkpoint_holds_no_pickles(tmp_path):
    run = Run(tmp_path)
    run.step()
    run.checkpoints.save(1)
    assert {path.suffix for path in (tmp_path / "checkpoint-1").iterdir()} == {".json", ".safetensors"}


def test_a_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="must name a checkpoint, got 'latest' but .* holds none"):
        Run(tmp_path / "none").checkpoints.resume("latest")
    Run(tmp_path).checkpoints.save(4)
    with pytest.raises(ValueError, match="got 'checkpoint-5'. Present in .*'checkpoint-4'"):
        Run(tmp_path).checkpoints.resume("checkpoint-5")
    assert Run(tmp_path).checkpoints.resume("checkpoint-4") == 4
    assert Run(tmp_path / "elsewhere").checkpoints.resume(str(tmp_path / "checkpoint-4")) == 4


def test_a_new_run_does_not_mix_its_checkpoints_with_those_of_another(tmp_path):
    Run(tmp_path, every=1).checkpoints.save(4)
    with pytest.raises(ValueError, match="no checkpoints of an earlier run, got .*checkpoint-4"):
        Run(tmp_path, every=1).checkpoints.resume(None)
    assert Run(tmp_path).checkpoints.resume(None) == 0


def test_another_run_is_refused_by_the_name_of_what_differs(tmp_path):
    Run(tmp_path).checkpoints.save(1)
    other = Run(tmp_path, {"seed": 0, "model": {"probe": [1.0, 2.5]}})
    before = other.weights()
    with pytest.raises(ValueError, match="`model.probe.1` must be the same .* was 2.0, got 2.5"):
        other.checkpoints.resume("latest")
    assert all(torch.equal(a, b) for a, b in zip(other.weights(), before))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, "`b` must be the same to continue run: it was None, got 2"),
        ({"a": 1, "b": 2}, {"a": 1}, "`b` .* it was 2, got None"),
        ({"a": [1, 2]}, {"a": [1]}, "`a.1` .* it was 2, got None"),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, "`a.b.c` .* it was 1, got 2"),
        ({"a": {"b": 1}}, {"a": None}, "`a` .* it was {'b': 1}, got None"),
        ({"a": "x" * 500}, {"a": "y"}, r"`a` .* it was 'x{119}\.\.\., got 'y'"),
    ],
)
def test_facts_that_differ(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=message):
        check_same_facts(old, new, "run")


def test_equal_facts_pass_also_as_tuples():
    check_same_facts({"a": [1, 2.0], "b": {"c": None}}, {"b": {"c": None}, "a": (1, 2)}, "run")


def test_a_checkpoint_says_whose_it_is(tmp_path):
    Run(tmp_path).checkpoints.save(12)
    step, facts = read_checkpoint(tmp_path / "checkpoint-12")
    assert (step, facts) == (12, json.loads(json.dumps(FACTS)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "`checkpointing_steps` must be at least 1, got 0"),
        ({"total_limit": 0}, "`checkpoints_total_limit` must be at least 1, got 0"),
    ],
)
def test_wrong_numbers(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        Run(tmp_path, **arguments)
