from __future__ import annotations

from pathlib import Path

import pytest

from diffusers_ext.eraser.files import load_eraser
from diffusers_ext.evaluation.erasure import evaluate_erasure
from diffusers_ext.evaluation.erasure_report import ErasureReport
from diffusers_ext.evaluation.judges import CLIPDetector
from diffusers_ext.rewards import CLIPScoreReward
from tests.tiny_clip import save_tiny_clip
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.training.erasure_runs import save_base_and_erasers

DRAWING = {"num_inference_steps": 1, "num_frames": 9, "height": 16, "width": 16,
           "guidance_scale": 2.0, "batch_size": 2}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, list[Path], Path]:
    """Folders of a tiny CogVideoX, of two erasers for it, and of a tiny CLIP."""
    folder = tmp_path_factory.mktemp("models")
    return *save_base_and_erasers(folder), save_tiny_clip(folder / "clip")


@pytest.fixture
def evaluate(run, models, tmp_path):
    """Run `evaluate erasure`."""
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,group,seed\na red seven,target,4\nred two,preserved,\n")

    def call(**flags):
        usual = {"pretrained_model_name_or_path": models[0], "eraser": models[1][0],
                 "evaluation_prompts": prompts, "output_dir": tmp_path / "out", "device": "cpu",
                 "judge": "clip", "judge_model": models[2], "classes": ["seven", "two"],
                 "target_concept": "seven"}  # fmt: skip
        given = {**usual, **DRAWING, **flags}
        return run("evaluate", "erasure", **{k: v for k, v in given.items() if v is not None})

    return call


def test_the_report_is_that_of_the_library(evaluate, models, tmp_path):
    ran = evaluate(json=True, kept_clips=1, scale=[0, 1], vae_tiling=True, seed=2)
    assert ran.code == 0
    pipeline = tiny_video_pipeline()
    pipeline.vae.enable_tiling()
    load_eraser(pipeline, models[1][0])
    clip = CLIPScoreReward.from_pretrained(models[2])
    expected = evaluate_erasure(
        pipeline,
        {"target": ["a red seven"], "preserved": ["red two"]},
        CLIPDetector(clip, ["seven", "two"], "seven"),
        scales=[0, 1],
        seed=2,
        seeds={"target": [4], "preserved": [None]},
        show_progress=False,
        **DRAWING,
    )
    found = ErasureReport.from_json(tmp_path / "out" / "report.json")
    assert found.rows == expected.rows
    assert all(row["scale 1/drift"] > 0 for row in found.rows)
    assert ran.facts["groups"] == expected.groups
    assert {"clips.csv", "report.json", "sheet.png", "table.md"} < set(ran.facts["files"])
    assert ran.facts["settings"]["eraser"] == [str(models[1][0])]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"eraser": "./nowhere"}, "no such folder"),
        ({"evaluation_prompts": "nowhere.csv"}, "got nowhere.csv: no such file."),
        ({"classes": None}, "`--classes` and `--target_concept` must be given for `--judge clip`"),
        ({"judge": "nudenet"}, "nudenet"),
        ({"fps": 0}, "`--fps` must be in [1, 50], got 0."),
        ({"kept_clips": -1}, "`--kept_clips` must be at least 0, got -1."),
        ({"concept_aspect": "digit"}, "`--concept_aspect` must be one of"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(evaluate, hub, tmp_path, flags, message):
    ran = evaluate(**flags)
    assert (ran.code, ran.out) == (1, "")
    assert message in ran.err
    assert not (tmp_path / "out").exists()


def test_another_pipeline_is_refused(evaluate, digits):
    ran = evaluate(pretrained_model_name_or_path=digits)
    assert ran.err.startswith("error: `--pretrained_model_name_or_path` must be a CogVideoXPipeline")
