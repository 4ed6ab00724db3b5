"""Checkpoints of earlier versions, which accelerate pickled, still resume, and run no code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from diffusers_ext.training.run.checkpoint_files import PARTIAL_PREFIX, _hash_files, finish_checkpoint
from tests.training.test_checkpoints import Run

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class Counter:
    """Something with a state."""

    def __init__(self) -> None:
        self.count = torch.zeros(2)

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]


class Evil:
    """Writes a file when it is unpickled in the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def save_as_before(run: Run, part: Counter, folder: Path) -> Path:
    """`checkpoint-1` as earlier versions wrote it."""
    partial = folder / f"{PARTIAL_PREFIX}1"
    partial.mkdir(parents=True)
    run.accelerator.register_for_checkpointing(part)
    hook = run.accelerator.register_save_state_pre_hook(lambda _, weights, __: weights.clear())
    run.accelerator.save_state(str(partial))
    hook.remove()
    run.checkpoints._write(partial)  # for the weights, which were like this before
    for path in partial.iterdir():
        if path.name != "trained_0.safetensors" and path.suffix in (".json", ".safetensors"):
            path.unlink()
    finish_checkpoint(partial, folder / "checkpoint-1", 1, run.checkpoints.fingerprint)
    rewrite_run(folder / "checkpoint-1")
    return folder / "checkpoint-1"


def rewrite_run(checkpoint: Path) -> None:
    """Let `run.json` fit the files, without a sum of itself."""
    run = json.loads((checkpoint / "run.json").read_text())
    run.pop("sha256", None)
    run["files"] = _hash_files(checkpoint)
    (checkpoint / "run.json").write_text(json.dumps(run))


@pytest.fixture
def old(tmp_path):
    run, part = Run(tmp_path), Counter()
    run.step()
    part.count += 3
    checkpoint = save_as_before(run, part, tmp_path)
    following = torch.randn(3)
    run.step()
    return checkpoint, run, following


def test_they_resume_to_the_bit(old, tmp_path):
    _, run, following = old
    other, part = Run(tmp_path), Counter()
    other.checkpoints.register(part)
    assert other.checkpoints.resume("latest") == 1
    assert torch.equal(torch.randn(3), following)
    assert part.count.tolist() == [3, 3]
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(other.weights(), run.weights()))


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin"])
def test_they_run_no_code(old, tmp_path, name):
    checkpoint, _, _ = old
    torch.save({"count": Evil(tmp_path / "ran")}, checkpoint / name, pickle_module=pickle)
    rewrite_run(checkpoint)
    other = Run(tmp_path)
    other.checkpoints.register(Counter())
    with pytest.raises(ValueError, match=f"{name} must hold nothing but numbers"):
        other.checkpoints.resume("latest")
    assert not (tmp_path / "ran").exists()


def test_random_states_that_are_broken_stop_the_run(old, tmp_path):
    checkpoint, _, _ = old
    torch.save({"step": 1}, checkpoint / "random_states_0.pkl")
    rewrite_run(checkpoint)
    other = Run(tmp_path)
    other.checkpoints.register(Counter())
    with pytest.raises(ValueError, match="random_states_0.pkl must hold the random states"):
        other.checkpoints.resume("latest")
