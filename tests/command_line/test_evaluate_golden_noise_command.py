from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from diffusers_ext.evaluation.golden_noise import evaluate_golden_noise
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport, RedenoisedTarget
from diffusers_ext.rewards import CLIPScoreReward
from tests.evaluation.golden_subjects import small_network
from tests.tiny_clip import save_tiny_clip

DRAWING = {"num_inference_steps": 2, "guidance_scale": 1.5, "num_images_per_prompt": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a small network and of a tiny CLIP."""
    folder = tmp_path_factory.mktemp("models")
    small_network().save_pretrained(folder / "small")
    return folder / "small", save_tiny_clip(folder / "clip")


@pytest.fixture
def evaluate(run, digits, models, tmp_path):
    """Run `evaluate golden-noise`."""
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt\na red nine\n# 1\na blue two\n")

    def call(**flags):
        usual = {"pretrained_model_name_or_path": digits, "prompt_file": prompts, "device": "cpu",
                 "output_dir": tmp_path / "out", "noise_model": models[0], "best_of": 1,
                 "max_prompts": 2, "reward": "clip_score", "reward_model": models[1]}  # fmt: skip
        given = {**usual, **DRAWING, **flags}
        return run("evaluate", "golden-noise", **{k: v for k, v in given.items() if v is not None})

    return call


def test_the_report_is_that_of_the_library(evaluate, digits, models, tmp_path):
    ran = evaluate(json=True, quiet=True, target_steps=1, redenoise_steps=12)
    assert (ran.code, ran.err) == (0, "")
    pipeline = StableDiffusionPipeline.from_pretrained(digits)
    expected = evaluate_golden_noise(
        pipeline,
        ["a red nine", "# 1"],
        refine={"1-step target": RedenoisedTarget(pipeline, 1, num_steps=12), "small": small_network()},
        rewards=CLIPScoreReward.from_pretrained(models[1]),
        best_of=1,
        show_progress=False,
        **DRAWING,
    )
    found = GoldenNoiseReport.from_json(tmp_path / "out" / "report.json")
    assert found.rows == expected.rows
    assert ran.facts["scores"] == expected.scores
    assert list(ran.facts["noise"]) == ["standard", "1-step target", "small"]
    assert ran.facts["files"] == ["pictures.csv", "report.json", "sheet.png", "table.md"]
    assert ran.facts["settings"]["noise_model"] == [str(models[0])]


def test_the_table_is_shown(evaluate, tmp_path):
    ran = evaluate(sheet_prompts=0, max_prompts=1)
    assert ran.code == 0
    assert "| small |" in ran.out
    assert ran.out.endswith(f"Wrote {tmp_path / 'out'}\n")
    assert not (tmp_path / "out" / "sheet.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"noise_model": None}, "`--noise_model` or `--target_steps` must be given"),
        ({"noise_model": "./nowhere"}, "nowhere"),
        ({"prompt_file": "nowhere.txt"}, "got nowhere.txt: no such file."),
        ({"prompt_column": "text"}, "must have the column 'text', got ['prompt']."),
        ({"w1": "inf"}, "`--w1` must be a finite number, got inf."),
        ({"best_of": 0}, "`--best_of` must be at least 1, got 0."),
        ({"reward": ["clip_score", "--reward=pickscore"]}, "must be REWARD=value, once for each of"),
        ({"reward_model": "./nowhere"}, "nowhere"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(evaluate, hub, tmp_path, flags, message):
    ran = evaluate(**flags)
    assert (ran.code, ran.out) == (1, "")
    assert message in ran.err
    assert not (tmp_path / "out").exists()
