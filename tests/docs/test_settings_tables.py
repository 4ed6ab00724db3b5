"""The tables of settings are what the command lines say."""

from __future__ import annotations

import pytest

from docs.settings_tables import script_parser, settings_table, with_tables
from tests.docs.snippets import ROOT


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_tables_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run `python docs/settings_tables.py`"


def test_every_group_of_every_script_has_a_table():
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    shared = {
        "positional arguments",
        "options",
        "model",
        "base model",
        "script",
        "training",
        "reporting",
        "sampling",
        "hub",
    }
    for script in (
        "train_nullspace_dreambooth", "build_covariance", "evaluate_nullspace", "generate_npd",
        "train_npnet", "train_noise_sequence", "train_noise_guard", "evaluate_golden_noise", "sample_golden_noise",
        "train_cogvideox_eraser",
        "evaluate_eraser",
    ):  # fmt: skip
        for group in script_parser(script)._action_groups:
            for action in group._group_actions if group.title not in shared else ():
                assert f"`{action.option_strings[0]}`" in pages, (script, action.dest)


def test_a_group_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"`groups` must be among .*, got \['weather'\]"):
        settings_table("train_npnet", ["weather"])


def test_a_flag_without_an_explanation_is_refused(monkeypatch):
    parser = script_parser("train_npnet")
    action = next(action for action in parser._actions if action.dest == "dataset_dir")
    monkeypatch.setattr(action, "help", None)
    monkeypatch.setattr("docs.settings_tables.script_parser", lambda script: parser)
    with pytest.raises(ValueError, match="Every setting must be explained, got --dataset_dir"):
        settings_table("train_npnet", ["noise data"])
