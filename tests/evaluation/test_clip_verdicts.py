from __future__ import annotations

import numpy as np
import pytest

from diffusers_ext.evaluation.erasure_rows import find_concept_aspect, judge_facts, judged


CLIPS = np.zeros((2, 3, 4, 4, 3), dtype=np.uint8)
PROMPTS = ["a", "b"]


class Judge:
    name, version, facts, concept_aspect = "stub", "3", {"threshold": 0.5}, "digit"

    def correct(self, clips: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
        return {
            "digit": np.ma.array([True, False], mask=[False, True]),
            "distance": np.array([1.5, 2.0]),
            "reads_as": np.array(["one", "two"]),
        }


def test_values_are_plain_and_masked_ones_none():
    expected = {"digit": [True, None], "distance": [1.5, 2.0], "reads_as": ["one", "two"]}
    assert judged(Judge(), CLIPS, PROMPTS) == expected
    assert judged(Judge().correct, CLIPS, PROMPTS) == expected
    assert type(judged(Judge(), CLIPS, PROMPTS)["digit"][0]) is bool


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([True, False], "must give a dictionary of arrays, one value per clip, got list"),
        ({}, "must give a dictionary"),
        ({"digit": np.array([True])}, r"per clip \(2\) for 'digit', got shape \(1,\)"),
        ({"digit": np.array([1, 2])}, "for 'digit', got shape .* of int64"),
        ({"digit": np.array([None, "a"])}, "of object"),
        ({"far": np.array([1.0, np.nan])}, "must give finite figures, got NaN .* 'far'"),
        ({"motion": np.array([1.0, 2.0])}, r"must not use the names .*, got \['motion'\]"),
    ],
)
def test_other_answers_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        judged(lambda clips, prompts: given, CLIPS, PROMPTS)


def test_a_masked_figure_may_be_anything():
    hidden = np.ma.array([1.0, np.nan], mask=[False, True])
    assert judged(lambda *_: {"far": hidden}, CLIPS, PROMPTS) == {"far": [1.0, None]}


def test_facts_of_objects_and_functions():
    facts = {"name": "stub", "version": "3", "threshold": 0.5}
    assert judge_facts(Judge()) == facts
    assert judge_facts(Judge().correct) == facts
    assert judge_facts(find_concept_aspect) == {"name": "find_concept_aspect", "version": None}


def test_the_aspect_of_the_concept():
    assert find_concept_aspect(Judge().correct, None, ["color", "digit"]) == "digit"
    assert find_concept_aspect(Judge(), "color", ["color", "digit"]) == "color"
    assert find_concept_aspect(print, None, ["color"]) == "color"
    for judge, given in ((print, None), (Judge(), "shape")):
        with pytest.raises(ValueError, match=r"`concept_aspect` must be one of .*'color', 'digit'"):
            find_concept_aspect(judge, given, ["color", "digit"])
