from __future__ import annotations

import json

import pytest

from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.training.eraser import run as train_cogvideox_eraser
from diffusers_ext.training.eraser.prompts import choose_anchor_concept, settle_anchor
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.training.eraser_runs import PRESERVED, TARGETS, read_report, train, write_eraser_files

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
RECIPE = EraserTraining(num_inference_steps=3)


def test_candidates_are_ranked_by_what_the_model_draws_for_them():
    ranked = choose_anchor_concept(tiny_video_pipeline(), TARGETS, "seven", PRESERVED, RECIPE)
    assert set(ranked) == set(PRESERVED)
    assert sorted(ranked.values()) == list(ranked.values())
    assert min(ranked.values()) > 0


@pytest.mark.parametrize(
    ("prompts", "candidates"), [(TARGETS, ()), (["a red three"], ["two"])], ids=["none", "unnamed"]
)
def test_nothing_to_choose_from(prompts, candidates):
    with pytest.raises(ValueError, match="`candidates` must name a concept"):
        choose_anchor_concept(tiny_video_pipeline(), prompts, "seven", candidates, RECIPE)


def test_the_script_chooses_and_writes_down_what_the_function_chooses(tmp_path):
    files = write_eraser_files(tmp_path)
    folder = train(files, tmp_path / "out", anchor_concept="auto", max_train_steps=1)
    anchor = json.loads((folder / "adapter_config.json").read_text())["anchor_concept"]
    recipe = EraserTraining(num_inference_steps=3, sampling_guidance_scale=6.0)
    ranked = choose_anchor_concept(tiny_video_pipeline(), TARGETS, "seven", PRESERVED, recipe)
    assert anchor == next(iter(ranked))
    anchors = read_report(folder)["prompts"]["anchor"]
    assert anchors == [prompt.replace("seven", anchor) for prompt in TARGETS]


def test_a_resumed_run_chooses_the_same_anchor_and_ends_with_the_same_bits(tmp_path):
    files = write_eraser_files(tmp_path)
    auto = {"anchor_concept": "auto", "checkpointing_steps": 1, "max_train_steps": 2}
    whole = train(files, tmp_path / "whole", **auto)
    middle = str(whole / "checkpoint-1")
    resumed = train(files, tmp_path / "resumed", **auto, resume_from_checkpoint=middle)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_candidates_that_were_not_chosen_leave_memory(tmp_path, monkeypatch):
    settled = []

    def keep(*args):
        settled.append(settle_anchor(*args))
        return settled[0]

    monkeypatch.setattr(train_cogvideox_eraser, "settle_anchor", keep)
    files = write_eraser_files(tmp_path)
    train(files, tmp_path / "out", anchor_concept="auto", max_train_steps=1)
    assert settled[0][0].anchors == {}


def test_the_script_needs_preserved_concepts_to_choose_from(tmp_path):
    files = write_eraser_files(tmp_path)
    (files / "kept.txt").write_text("a red three\n")
    with pytest.raises(ValueError, match="`anchor_concept` must be a word where there are no"):
        train(
            files,
            tmp_path / "out",
            anchor_concept="auto",
            preserved_concepts_file=None,
            preserved_prompts_file=files / "kept.txt",
        )
    assert not (tmp_path / "out").exists()
