"""Every flag and default that the scripts had stays; settings are checked where they are made."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from diffusers_ext.core.settings import named_values
from docs.settings_tables import script_parser


FLAGS = json.loads((Path(__file__).parents[1] / "fixtures" / "training_flags.json").read_text())
# Settings with a better name today, and the flag that still gives them.
RENAMED = {"guidance_scale": "negative_guidance", "rows_in_turn": "separate_passes"}


def minimal_line(script: str) -> list[str]:
    return [word for name in FLAGS[script]["required"] for word in (f"--{name}", f"given_{name}")]


@pytest.mark.parametrize("script", FLAGS)
def test_a_script_has_all_flags_and_defaults_that_it_had(script):
    known = {
        option for action in script_parser(script)._actions for option in action.option_strings
    }
    assert not set(FLAGS[script]["flags"]) - known
    found = importlib.import_module(f"training.{script}").parse_args(minimal_line(script))
    values = named_values(found)
    defaults = {
        name if name in values else RENAMED[name]: value
        for name, value in FLAGS[script]["defaults"].items()
    }
    assert {name: values[name] for name in defaults} == defaults
    assert {name: values[name] for name in FLAGS[script]["required"]} == {
        name: f"given_{name}" for name in FLAGS[script]["required"]
    }
