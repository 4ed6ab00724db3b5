"""Pictures with an edit of knowledge and without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffusers_ext.evaluation.editing import (
    UNSEEN_TEMPLATES,
    EditingReport,
    anchor_prompts,
    contrast_judge,
    editing_groups,
    evaluate_edit,
)
from diffusers_ext.nullspace.edit import edit_concept
from diffusers_ext.nullspace.edit_prompts import TEMPLATES, ConceptEdit
from diffusers_ext.sharing import measured_results
from tests.evaluation.conftest import make_pipeline

PRESERVE = ["a red three", "a red one", "a red nine"]
QUICK = {"num_inference_steps": 2, "num_images_per_prompt": 2, "max_prompts": 2, "show_progress": False}


def test_groups_name_a_target_or_none():
    groups = editing_groups([ConceptEdit("three", "nine")], PRESERVE)
    assert groups["target"] == ["a red three", *(t.format("three") for t in TEMPLATES)]
    assert groups["unseen"] == [t.format("three") for t in UNSEEN_TEMPLATES]
    assert groups["preserved"] == PRESERVE[1:]
    assert groups["unseen_others"] == [t.format("one") for t in UNSEEN_TEMPLATES]


def test_given_prompts_are_split_by_what_they_name():
    given = ["a Three on a wall", "one on a wall", "a red nine", "a three"]
    groups = editing_groups([ConceptEdit("three", "nine")], PRESERVE, given)
    assert (groups["unseen"], groups["unseen_others"]) == (["a Three on a wall"], ["one on a wall"])


def test_all_targets_of_a_prompt_are_replaced():
    edits = [ConceptEdit("three", {"nine": 0.5, "one": 0.5}), ConceptEdit("red", "blue")]
    assert anchor_prompts("a red three", edits) == ["a blue nine", "a blue one"]
    assert anchor_prompts("a three", [ConceptEdit("three", "")]) == []


def fits(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """A picture of brightness 3 fits prompts with "three" best."""
    words = {"three": 3, "nine": 9}
    wanted = [next((value for word, value in words.items() if word in p.split()), 6) for p in prompts]
    return torch.tensor([-abs(image.getpixel((0, 0)) - value) for image, value in zip(images, wanted)]).float()


@pytest.mark.parametrize(("anchor", "second"), [("nine", False), ("", True)])
def test_scores_judge_by_the_better_of_two_prompts(anchor, second):
    judge = contrast_judge(fits, [ConceptEdit("three", anchor)])
    images = [Image.new("L", (1, 1), value) for value in (3, 4, 9)]
    assert judge(images, ["a three"] * 3).tolist() == [True, True, False]
    assert judge(images[2:], ["a nine"]).tolist() == [True]
    assert judge(images[:1], ["a nine"]).tolist() == [second]


@pytest.fixture(scope="module")
def edited() -> StableDiffusionPipeline:
    pipeline = make_pipeline()
    pipeline.load_lora_weights(edit_concept(pipeline, {"three": "nine"}, PRESERVE, preserve_weight=0.01).lora)
    return pipeline


def test_the_report_tells_what_the_judge_reads(edited, tmp_path):
    asked = []

    def judge(images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        asked.extend(prompts)
        return np.array(["nine" in prompt for prompt in prompts])

    report = evaluate_edit(edited, {"three": "nine"}, PRESERVE, judge=judge, **QUICK)
    target, unseen = report.summary["target"], report.summary["unseen"]
    assert (target["target_read_tuned"], target["anchor_read_tuned"]) == (0, 1)
    assert (unseen["target_read_base"], unseen["anchor_read_base"], unseen["prompts"]) == (0, 1, 2)
    assert report.summary["preserved"]["accuracy_base"] == 0.5
    assert report.summary["unseen_others"]["accuracy_tuned"] == 0
    assert target["pixel_drift"] > report.summary["preserved"]["pixel_drift"] > 0
    assert {"a red three", "a red nine"} <= {*asked}
    report.save(tmp_path)
    assert EditingReport.from_json(tmp_path / "report.json") == report
    found = {(one.dataset, one.metric): one.value for one in measured_results(tmp_path)}
    assert found["target prompts", "target read tuned"] == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 8 * 96


def test_scores_alone_judge_targets(edited):
    report = evaluate_edit(
        edited, {"three": ""}, PRESERVE, scorer=lambda images, prompts: torch.zeros(len(images)), **QUICK
    )
    assert report.settings["judged_by"] == "scorer"
    assert report.summary["target"]["target_read_tuned"] == 0
    assert "anchor_read_tuned" not in report.summary["target"]
    assert "accuracy_base" not in report.summary["preserved"]


@pytest.mark.parametrize(
    ("edits", "changes", "message"),
    [
        ([ConceptEdit("three")], {}, "`edits` must name what stands for each target, got none for .'three'."),
        ([], {}, "`edits` must name what stands for each target"),
        ({"three": "nine"}, {"max_prompts": 0}, "`max_prompts` must be at least 1"),
    ],
)
def test_bad_input_is_refused(edited, edits, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate_edit(edited, edits, PRESERVE, **{**QUICK, **changes})
