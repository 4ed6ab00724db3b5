"""Prompts of an edit, and the places of their tokens."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext.nullspace.edit_prompts import (
    TEMPLATES,
    ConceptEdit,
    EditPrompts,
    anchor_mixture,
    carried_along,
    check_read_apart,
    split_prompts,
    stand_ins,
)
from tests.tiny_digits import random_digits_pipeline


def test_preserved_prompts_that_name_the_target_are_edited():
    edits, preserved = split_prompts([ConceptEdit("three", "nine")], ["a red three", "a red nine"], True)
    assert edits[0].targets[:3] == ["a red three", "red three", "a three"]
    ((anchors, weights),) = edits[0].anchors
    assert anchors[:3] == ["a red nine", "red nine", "a nine"]
    assert weights.flatten().tolist() == [1.0] * len(anchors)
    assert edits[0].targets[3:] == [t.format("three") for t in TEMPLATES if t != "a {}"]
    assert preserved == ["a red nine", "red nine", "a nine", "a red"]


def test_own_prompts_leave_the_others_preserved():
    edit = ConceptEdit("seven", "green seven", prompts=["the digit seven"])
    edits, preserved = split_prompts([edit], ["a red seven", "the digit seven"], False)
    assert edits[0].targets == ["the digit seven"]
    assert [anchors for anchors, _ in edits[0].anchors] == [["the digit green seven"]]
    assert preserved == ["a red seven"]


def test_an_empty_anchor_empties_the_prompt():
    (edit,), _ = split_prompts([ConceptEdit("three", "", prompts=["a red three"])], ["a nine"], True)
    assert [anchors for anchors, _ in edit.anchors] == [[""]]


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ({"three": "nine", "Five": "six"}, {"a photo of nine and six": 1}),
        ({"three": "five", "five": "three"}, {"a photo of five and three": 1}),
        ({"three": "nine", "three and five": "two"}, {"a photo of two": 1}),
        ({"three": "green three", "five": ""}, {"": 1}),
        (
            {"three": {"nine": 0.5, "one": 0.5}, "five": {"six": 0.25, "one": 0.75}},
            {
                "a photo of nine and six": 0.125,
                "a photo of nine and one": 0.375,
                "a photo of one and six": 0.125,
                "a photo of one and one": 0.375,
            },
        ),
        ({"red": "blue"}, {"a photo of three and five": 1}),
    ],
)
def test_all_targets_of_a_prompt_are_replaced_at_once(edits, expected):
    found = anchor_mixture("a photo of three and five", [ConceptEdit(*edit) for edit in edits.items()])
    assert found == expected


def test_prompts_of_one_edit_tell_the_others_but_for_what_these_leave_alone():
    three, five = ConceptEdit("three", {"nine": 0.5, "one": 0.5}, prompts=["three", "three and five"]), "five"
    for own, anchors in (((), ["nine", "nine and six"]), (["a five"], ["nine", "nine and five"])):
        found = EditPrompts(three, list(three.prompts), [], [ConceptEdit(five, "six", own)]).anchors
        assert [prompts for prompts, _ in found] == [anchors, [text.replace("nine", "one") for text in anchors]]
        assert all(weights.flatten().tolist() == [0.5, 0.5] for _, weights in found)
    mixed = EditPrompts(three, list(three.prompts), [], [ConceptEdit(five, {"six": 0.5, "two": 0.5})]).anchors
    assert [prompts[1] for prompts, _ in mixed] == ["nine and six", "nine and two", "one and six", "one and two"]
    assert torch.cat([weights for _, weights in mixed], 1)[..., 0].tolist() == [[0.5, 0.5, 0, 0], [0.25] * 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((" ", "nine"), "`target` must be a word"),
        (("three", "three"), "`anchor` must differ from `target`"),
        (("three", {"nine": 0.5, "one": 0.6}), "`anchor` must have weights that sum to 1"),
        (("three", "nine", ["a red one"]), "`prompts` must name the target 'three'"),
    ],
)
def test_edits_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConceptEdit(*arguments)


def test_edits_are_read_from_a_mapping_or_as_they_are():
    edits = [ConceptEdit("three", "nine"), ConceptEdit("red", {"blue": 1.0})]
    assert ConceptEdit.read(edits) == edits == ConceptEdit.read({"three": "nine", "red": {"blue": 1.0}})
    for wrong in ("three", ["three"], [("three", "nine")]):
        with pytest.raises(ValueError, match="`edits` must be {target: anchor} or `ConceptEdit`s, got"):
            ConceptEdit.read(wrong)


def test_nothing_left_to_preserve_is_refused():
    with pytest.raises(ValueError, match="`preserve` must hold a prompt that names no target"):
        split_prompts([ConceptEdit("three", "nine")], ["a red three"], True)


def test_two_edits_of_one_target_are_refused():
    with pytest.raises(ValueError, match="`edits` must name each target once, got 'Three' again"):
        split_prompts([ConceptEdit("three", "nine"), ConceptEdit("Three", "one")], ["a nine"], True)


def test_a_preserved_prompt_that_reads_as_an_edited_one_is_refused():
    edits, preserved = split_prompts([ConceptEdit("three", "nine")], ["a  three", "a one", "THREE ."], False)
    check_read_apart(random_digits_pipeline(), edits, preserved)
    long = "a red " * 8
    edits, preserved = split_prompts([ConceptEdit("three", "nine")], [f"{long}three", f"{long}one"], False)
    with pytest.raises(ValueError, match="`preserve` must hold no prompt that the model reads as one with the target"):
        check_read_apart(random_digits_pipeline(), edits, preserved)


def test_edits_that_want_two_things_of_the_same_tokens_are_refused():
    edits, preserved = split_prompts(ConceptEdit.read({"caf\u00e9": "nine", "cafe\u0301": "nine"}), ["a one"], False)
    check_read_apart(random_digits_pipeline(), edits, preserved)  # one wish, spelled twice
    edits, _ = split_prompts(ConceptEdit.read({"caf\u00e9": "nine", "cafe\u0301": "one"}), ["a one"], False)
    with pytest.raises(
        ValueError, match="`edits` must not ask for two things in one place, got 'cafe\u0301' and 'caf"
    ):
        check_read_apart(random_digits_pipeline(), edits, preserved)


def test_a_stand_in_holds_no_other_one():
    preserve = ["a red seven"]
    assert stand_ins("red", preserve, ["a blue seven", "a photo of the blue digit seven"]) == ["blue"]
    assert stand_ins("seven", preserve, ["a red nine"]) == ["nine"]


def test_earlier_edits_follow_those_of_their_anchors():
    earlier = ConceptEdit.read({"five": "seven", "two": {"seven": 0.5, "one": 0.5}, "six": "nine"})
    found = carried_along(ConceptEdit.read({"seven": "four", "eight": "six"}), earlier)
    assert [(edit.target, edit.weights) for edit in found] == [
        ("five", {"four": 1.0}),
        ("two", {"four": 0.5, "one": 0.5}),
    ]
    assert carried_along([ConceptEdit("five", "eight")], earlier) == []
    emptied = carried_along([ConceptEdit("seven", "")], earlier[:1])
    assert [(edit.target, edit.weights) for edit in emptied] == [("five", {"": 1.0})]


def test_earlier_edits_are_preserved_as_they_are_read_by_now():
    edits, preserved = split_prompts(
        [ConceptEdit("seven", "one")],
        ["a red two"],
        False,
        [ConceptEdit("five", "nine"), ConceptEdit("red seven", "two")],
    )
    assert {"a five", "a photo of a five"} <= {*preserved}
    assert not any("seven" in prompt for prompt in preserved)
    assert "a five" not in edits[0].targets
