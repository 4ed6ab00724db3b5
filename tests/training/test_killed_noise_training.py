"""Trainings of golden-noise networks that are killed on the way and go on to the same bits."""

from __future__ import annotations

import json

import pytest

from diffusers_ext.training.run.checkpoint_files import list_checkpoints
from tests.training.noise_runs import noise_line, train
from tests.training.noise_sets import write_noises

STATEFUL = {
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 8,
    "logging_steps": 3,
    "validation_steps": 2,
    "use_ema": True,
}
STOPPED = {"checkpointing_steps": 4, "use_ema": True}
DROPOUT = {"npnet": {"svd_dropout": True, "nt_dropout": True}, "rnn": {"dropout": 0.2}}
SCRIPTS = {"npnet": "train_npnet", "rnn": "train_noise_sequence"}
HALF_RESULT = """
import time
from pathlib import Path

from diffusers import ModelMixin

def save_half(self, folder, **_):
    Path(folder, "config.json").write_text("half")
    Path({marker!r}).touch()
    time.sleep(600)

ModelMixin.save_pretrained = save_half
"""
pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module", params=SCRIPTS)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def noises(model, tmp_path_factory):
    return write_noises(tmp_path_factory.mktemp("noises") / "set", 1 if model == "npnet" else 2)


@pytest.fixture(scope="module")
def run(model) -> dict:
    """What one whole training and the killed ones have in common."""
    return {**STATEFUL, **DROPOUT[model], "checkpointing_steps": 3, "checkpoints_total_limit": 2}


@pytest.fixture(scope="module")
def expected(model, noises, run, tmp_path_factory) -> dict:
    return result_of(train(model, noises, tmp_path_factory.mktemp("whole") / "out", **run))


@pytest.fixture(scope="module")
def stopped(model, noises, tmp_path_factory):
    """A run to go on with; those that are refused leave it as it is."""
    return train(model, noises, tmp_path_factory.mktemp("stopped") / "out", **STOPPED)


def result_of(folder) -> dict:
    """All that a training leaves, without what differs between two runs of one command."""
    report = json.loads((folder / "training_report.json").read_text())
    del report["arguments"], report["seconds"]
    files = [path for path in folder.iterdir() if path.is_file()]
    kept = [path for path in files if path.name != "training_report.json"]
    return {"report": report, **{path.name: path.read_bytes() for path in kept}}


@pytest.mark.parametrize("moment", ["between two steps", "the result is half written"])
def test_killed_while(moment, model, noises, run, expected, server, tmp_path):
    killed, marker = tmp_path / "killed", tmp_path / "marker"
    half = moment == "the result is half written"
    patch = HALF_RESULT.format(marker=str(marker)) if half else ""
    seen = marker.exists if half else (killed / "checkpoint-3").exists
    line = noise_line(model, noises, killed, **run)
    server.kill_when(SCRIPTS[model], line, seen, patch)
    assert not (killed / "config.json").exists()
    resumed = train(model, noises, killed, **run, resume_from_checkpoint="latest")
    result = result_of(resumed)
    assert result == expected
    assert [entry["step"] for entry in result["report"]["validation"]] == [2, 4, 6, 8]
    assert [folder.name for folder in list_checkpoints(killed)] == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 1e-2, "use_ema": None}, "must be the same to continue"),
        ({"validation_split": 0.5}, "`data.training_samples` must be the same .* 24, got 16"),
        ({"max_train_steps": 2}, "`max_train_steps` must be at least the 4 steps"),
    ],
)
def test_another_run_is_refused_before_the_text_is_encoded(changed, message, model, noises, stopped, monkeypatch):
    monkeypatch.setattr("diffusers_ext.training.noise.load_text_pipeline", None)
    arguments = {**STOPPED, "resume_from_checkpoint": "latest", **changed}
    with pytest.raises(ValueError, match=message):
        train(model, noises, stopped, **arguments)


def test_another_structure_is_refused(model, noises, tmp_path):
    train(model, noises, tmp_path / "out", checkpointing_steps=4)
    change = {"npnet": {"svd_hidden_dim": 8}, "rnn": {"gru_hidden_size": 8}}[model]
    with pytest.raises(ValueError, match="must be the same to continue"):
        train(model, noises, tmp_path / "out", resume_from_checkpoint="latest", **change)
