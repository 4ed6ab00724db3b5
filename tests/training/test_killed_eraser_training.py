"""A training of an eraser that is killed on the way and goes on to the same bits."""

from __future__ import annotations

import pytest

from tests.training.eraser_runs import eraser_line, read_report, train, write_eraser_files

RUN = {
    "lr_scheduler": "cosine",
    "gradient_accumulation_steps": 2,
    "max_train_steps": 6,
    "logging_steps": 2,
    "checkpointing_steps": 2,
    "on_policy_share": 0.5,
    "on_policy_every": 3,
    "adversarial_share": 0.5,
    "adversarial_every": 2,
    "adversarial_steps": 2,
}


def half_written(marker) -> str:
    return f"""
import time
from pathlib import Path

import diffusers_ext.training.eraser.result

def save_half(transformer, folder, **_):
    Path(folder, "adapter_config.json").write_text("half")
    Path({str(marker)!r}).touch()
    time.sleep(600)

diffusers_ext.training.eraser.result.save_eraser = save_half
"""


@pytest.mark.usefixtures("fresh_accelerator")
def test_killed_while_the_result_is_half_written(server, tmp_path):
    files = write_eraser_files(tmp_path)
    killed, marker = tmp_path / "killed", tmp_path / "marker"
    line = eraser_line(files, killed, **RUN)
    server.kill_when("train_cogvideox_eraser", line, marker.exists, half_written(marker))
    assert not (killed / "adapter_config.json").exists()
    from_middle = str(killed / "checkpoint-4")
    resumed = train(files, killed, **RUN, resume_from_checkpoint=from_middle)
    whole = train(files, tmp_path / "whole", **RUN)
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert all((resumed / name).read_bytes() == (whole / name).read_bytes() for name in names)
    assert read_report(resumed)["history"] == read_report(whole)["history"]
