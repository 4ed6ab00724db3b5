"""What an edit's report says before anything is written."""

from __future__ import annotations

import logging

import pytest
import torch

from diffusers_ext.nullspace.edit import EditedConcepts, edit_concept
from diffusers_ext.nullspace.edit_prompts import ConceptEdit, EditPrompts
from diffusers_ext.nullspace.edit_report import Neighbour, edit_warnings, neighbours
from diffusers_ext.nullspace.text_only import denoiser_arguments
from examples.digits.prompts import COLORS, DIGITS
from tests.tiny_digits import random_digits_pipeline


def test_neighbours_stand_where_the_target_stands():
    edit = EditPrompts(ConceptEdit("three", "nine"), ["three", "a red three", "the three", "three in red"], [])
    preserved = ["a red one", "a red nine", "one in red", "the large two", "a blue one"]
    assert neighbours(edit, preserved) == [
        Neighbour("one", ["a red one", "one in red"]),
        Neighbour("large two", ["the large two"]),
    ]


PRESERVED = ["a red three", "a red one", "a red eight", "the number seven"]


@pytest.fixture(scope="module")
def edited() -> EditedConcepts:
    return edit_concept(random_digits_pipeline(), {"three": "nine"}, PRESERVED, preserve_weight=0.1)


def test_shares_are_those_of_what_the_linears_give(edited):
    pipeline = random_digits_pipeline()

    def outputs(prompt: str, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        k = denoiser_arguments(pipeline, [prompt])["encoder_hidden_states"][0].double()
        return torch.cat([k @ weight.T for weight in weights.values()], dim=1)

    names = [row["linear"] for row in edited.report.layers]
    base = {name: pipeline.unet.get_submodule(name).weight.double() for name in names}
    update = {
        n: (edited.lora[f"unet.{n}.lora_B.weight"] @ edited.lora[f"unet.{n}.lora_A.weight"]).double() for n in names
    }
    (row,) = edited.report.concepts
    moved = outputs("a red one", update).square().sum()
    way = (outputs("a red nine", base) - outputs("a red one", base)).square().sum()
    assert row["neighbours"]["one"] == pytest.approx((moved / way).item(), rel=1e-4)
    drift = moved / outputs("a red one", base).square().sum()
    assert edited.report.most_moved["a red one"] == pytest.approx(drift.item(), rel=1e-4)


def test_each_edit_tells_what_it_is_made_of(edited):
    (row,) = edited.report.concepts
    assert (row["target"], row["anchor"], row["named"], row["own_prompts"]) == (
        "three",
        "nine",
        ["a red three"],
        False,
    )
    assert set(row["neighbours"]) == {"one", "eight", "number seven"}
    assert row["prompts"] == edited.report.edited_prompts
    assert 0.5 < row["achieved"] < 1


def test_a_neighbour_that_goes_along_is_warned_of_by_name(caplog):
    with caplog.at_level(logging.WARNING, "diffusers_ext"):
        edit = edit_concept(random_digits_pipeline(), {"three": "nine"}, PRESERVED, preserve_weight=1e-9)
    share = edit.report.concepts[0]["neighbours"]["one"]
    assert share > 0.15
    (warning,) = edit.report.warnings
    assert warning.startswith("Preserved concepts lie too near 'three'")
    assert f"'one' by {share:.2f}" in warning
    assert warning in caplog.messages


def test_a_target_that_is_held_fast_is_warned_of():
    edit = edit_concept(random_digits_pipeline(), {"three": "nine"}, PRESERVED, preserve_weight=1e6)
    assert edit.report.concepts[0]["achieved"] < 0.5
    assert "What is preserved holds 'three' fast" in edit.report.warnings[0]


def test_more_edits_than_what_is_preserved_leaves_room_for_are_warned_of():
    """`hard` refuses them; otherwise each is told how much of it is made."""
    targets = ("zero", "two", "three", "four", "five")
    edits = dict.fromkeys(targets, "nine")
    preserve = [f"{article} {color} {digit}" for article in ("a", "the") for color in COLORS for digit in DIGITS[6:]]
    with pytest.raises(ValueError, match="must leave directions free for `hard=True`, one for each of 5 edits"):
        edit_concept(random_digits_pipeline(), edits, preserve, hard=True)
    report = edit_concept(random_digits_pipeline(), edits, preserve, preserve_weight=1e4).report
    held = [row["target"] for row in report.concepts if row["achieved"] < 0.8]
    assert held
    assert [f"What is preserved holds {target!r} fast" in " ".join(report.warnings) for target in held] == [
        True
    ] * len(held)
    assert "make fewer edits at once" in " ".join(report.warnings)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"named": []}, ["No preserved prompt names 'three': it is edited in the usual templates alone."]),
        ({"named": [], "own_prompts": True}, []),
        (
            {"own_prompts": True},
            [
                "1 preserved prompts name 'three' and are kept as they are, such as 'a three': only the edit's own "
                "prompts are edited."
            ],
        ),
    ],
)
def test_what_is_edited_is_told(changed, said):
    row = {"target": "three", "anchor": "", "named": ["a three"], "own_prompts": False, "achieved": 0.9}
    assert edit_warnings([{**row, "neighbours": {"one": 0.1}, **changed}]) == said
