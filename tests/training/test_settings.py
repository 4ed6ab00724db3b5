"""Every flag and default that the scripts had stays; settings are checked where they are made."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from diffusers_ext.core.settings import named_values
from diffusers_ext.training.run import checkpoint_files
from docs.settings_tables import script_parser

FLAGS = json.loads((Path(__file__).parents[1] / "fixtures" / "training_flags.json").read_text())
# Settings with a better name today, and the flag that still gives them.
RENAMED = {"guidance_scale": "negative_guidance", "rows_in_turn": "separate_passes"}


def minimal_line(script: str) -> list[str]:
    return [word for name in FLAGS[script]["required"] for word in (f"--{name}", f"given_{name}")]


@pytest.mark.parametrize("script", FLAGS)
def test_a_script_has_all_flags_and_defaults_that_it_had(script):
    known = {option for action in script_parser(script)._actions for option in action.option_strings}
    assert not set(FLAGS[script]["flags"]) - known
    found = importlib.import_module(f"training.{script}").parse_args(minimal_line(script))
    values = named_values(found)
    defaults = {name if name in values else RENAMED[name]: value for name, value in FLAGS[script]["defaults"].items()}
    assert {name: values[name] for name in defaults} == defaults
    assert {name: values[name] for name in FLAGS[script]["required"]} == {
        name: f"given_{name}" for name in FLAGS[script]["required"]
    }


def test_former_names_are_read_from_checkpoints_and_files(tmp_path, monkeypatch):
    old = {"guidance_scale": 0.5, "rows_in_turn": True, "weight_decay": 0.0}
    run = {"step": 3, "fingerprint": {"recipe": old}}
    monkeypatch.setattr(checkpoint_files, "_read_run", lambda folder: run)
    new = {"negative_guidance": 0.5, "separate_passes": True, "adam_weight_decay": 0.0}
    assert checkpoint_files.read_checkpoint(tmp_path) == (3, {"recipe": new})
    (tmp_path / "run.yaml").write_text("guidance_scale: 0.25\nrows_in_turn: true\n")
    line = [*minimal_line("train_cogvideox_eraser"), "--config", str(tmp_path / "run.yaml")]
    found = importlib.import_module("training.train_cogvideox_eraser").parse_args(line)
    assert (found.negative_guidance, found.separate_passes) == (0.25, True)
