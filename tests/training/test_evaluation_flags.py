"""Every flag that a script of an evaluation or a plan has taken since its first release."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from docs.settings_tables import script_parser

FLAGS = json.loads((Path(__file__).parents[1] / "fixtures/evaluation_flags.json").read_text())
ACTIONS = {"append": argparse._AppendAction, "store_true": argparse._StoreTrueAction}


def described(action: argparse.Action, like: dict) -> dict:
    """What a parser knows of a flag, as the list describes it."""
    found = {"type": getattr(action.type, "__name__", None), "default": action.default,
             "nargs": action.nargs, "choices": action.choices and list(action.choices),
             "action": next((n for n, kind in ACTIONS.items() if type(action) is kind), None)}  # fmt: skip
    return {name: found[name] for name in like}


@pytest.mark.parametrize("script", FLAGS)
def test_no_flag_is_lost(script):
    parser = script_parser(script)
    found = {option: action for action in parser._actions for option in action.option_strings}
    assert FLAGS[script].keys() <= found.keys()
    for flag, like in FLAGS[script].items():
        if found[flag].default == argparse.SUPPRESS:  # the plan's settings have it
            continue
        assert described(found[flag], like) == like, flag
        if "default" not in like and "action" not in like:
            assert found[flag].default is None, flag
