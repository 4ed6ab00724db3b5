from __future__ import annotations

import numpy as np
import pytest

from diffusers_ext.evaluation.erasure_rows import (
    clip_drift,
    clip_shots,
    find_concept_aspect,
    judge_facts,
    judged,
    list_aspects,
    measure_pairs,
    motion,
)

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


GROUPS = {"preserved": ["a", "b"], "other words": ["s"], "target": ["s", "t", "s"]}


def test_every_entry_gets_clips_with_seeds_of_their_own():
    shots = clip_shots(GROUPS, 2, seed=0)
    assert [(s.group, s.prompt, s.index) for s in shots if s.group == "target"] == [
        *(("target", "s", 0), ("target", "s", 1), ("target", "t", 0), ("target", "t", 1)),
        *(("target", "s", 2), ("target", "s", 3)),
    ]
    assert shots[0].group == "target"  # whatever the order of the groups
    target = [shot.seed for shot in shots if shot.group == "target"]
    assert len(set(target)) == 6
    assert all(0 <= shot.seed < 2**63 for shot in shots)
    assert {shot.seed for shot in clip_shots(GROUPS, 2, seed=1)}.isdisjoint(target)


def test_a_seed_depends_on_its_prompt_alone():
    alone = clip_shots({"target": ["t"], "preserved": ["b"]}, 2, seed=0)
    among = clip_shots(GROUPS, 2, seed=0)
    assert set(alone) <= set(among)


def test_given_seeds_are_of_first_clips():
    given = {"target": [7, None, 9]}
    shots = [s for s in clip_shots(GROUPS, 2, seed=0, seeds=given) if s.group == "target"]
    derived = [s for s in clip_shots(GROUPS, 2, seed=0) if s.group == "target"]
    assert [shots[0].seed, shots[4].seed] == [7, 9]
    assert shots[2:4] == derived[2:4]
    assert len({shot.seed for shot in shots}) == 6


@pytest.mark.parametrize(
    ("groups", "count", "seeds", "message"),
    [
        (GROUPS, 0, None, "`num_videos_per_prompt` must be at least 1, got 0"),
        ({"target": ["a"]}, 1, None, r"got none of \['preserved'\]"),
        ({"target": [], "preserved": ["a"]}, 1, None, r"got none of \['target'\]"),
        ({"target": ["a"], "preserved": ["a"]}, 1, None, r"in 'target' and in 'preserved', got \['a'\]"),
        ({"target": "a", "preserved": ["b"]}, 1, None, "`target` must be a list of prompts"),
        (GROUPS, 1, {"target": [1]}, r"one entry per prompt of 'target' \(3\), got 1"),
    ],
)  # fmt: skip
def test_other_prompts_are_refused(groups, count, seeds, message):
    with pytest.raises(ValueError, match=message):
        clip_shots(groups, count, 0, seeds)


def test_rows_hold_what_was_judged_and_measured():
    shots = clip_shots({"target": ["s"], "preserved": ["a"]}, 1, 0)
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (2, 4, 8, 8, 3), dtype=np.uint8)
    clips = {"base": base, "erased": np.zeros_like(base)}

    def judge(clips: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
        mask = [prompt == "a" for prompt in prompts]
        return {"bright": np.ma.array(clips.mean(axis=(1, 2, 3, 4)) > 50, mask=mask), "prompt": np.array(prompts)}

    rows = measure_pairs(shots, clips, judge)
    assert [row["base/bright"] for row in rows] == [True, None]
    assert [row["erased/bright"] for row in rows] == [False, None]
    assert [row["erased/prompt"] for row in rows] == ["s", "a"]
    assert [row["base/motion"] for row in rows] == motion(base).tolist()
    assert [row["erased/drift"] for row in rows] == clip_drift(base, clips["erased"]).tolist()
    assert [row["base/degenerate"] for row in rows] == ["noise", "noise"]
    assert [row["erased/degenerate"] for row in rows] == ["blank", "blank"]
    assert [row["seed"] for row in rows] == [shot.seed for shot in shots]
    assert "base/drift" not in rows[0]
    assert list_aspects(rows) == ["bright"]
