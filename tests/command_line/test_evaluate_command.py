from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffusers_ext.eraser.files import load_eraser
from diffusers_ext.evaluation.erasure import evaluate_erasure
from diffusers_ext.evaluation.erasure_report import ErasureReport
from diffusers_ext.evaluation.forgetting import ForgettingReport, evaluate_forgetting
from diffusers_ext.evaluation.golden_noise import RedenoisedTarget, evaluate_golden_noise
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.evaluation.judges import CLIPDetector
from diffusers_ext.rewards import CLIPScoreReward
from tests.command_line.conftest import PROMPTS
from tests.evaluation.golden_subjects import small_network
from tests.tiny_clip import save_tiny_clip
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.training.erasure_runs import save_base_and_erasers

PICTURES = {"num_inference_steps": 2, "guidance_scale": 3.0, "num_images_per_prompt": 2}


@pytest.fixture
def evaluate_loras(run, digits, prompts, lora, tmp_path):
    """Run `evaluate forgetting`."""

    def call(**flags):
        usual = {"pretrained_model_name_or_path": digits, "knowledge_prompts": prompts,
                 "output_dir": tmp_path / "out", "device": "cpu", "lora": lora}  # fmt: skip
        return run("evaluate", "forgetting", **{**usual, **PICTURES, **flags})

    return call


def test_the_report_on_loras_is_that_of_the_library(evaluate_loras, digits, lora, tmp_path):
    ran = evaluate_loras(json=True, quiet=True, seed=3)
    assert (ran.code, ran.err) == (0, "")
    pipeline = StableDiffusionPipeline.from_pretrained(digits)
    pipeline.load_lora_weights(lora)
    expected = evaluate_forgetting(
        pipeline, None, PROMPTS, seed=3, show_progress=False, **PICTURES
    )  # fmt: skip
    found = ForgettingReport.from_json(tmp_path / "out" / "report.json")
    assert found.rows == expected.rows
    assert ran.facts["summary"] == expected.summary
    assert ran.facts["summary"]["preserved"]["pixel_drift"] > 0
    assert ran.facts["files"] == ["report.json", "sheet.png", "table.md"]
    assert ran.facts["settings"]["lora"] == [str(lora)]
    assert "rows" not in ran.facts


def test_subjects_and_features(evaluate_loras, lora, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (32, 32), "red").save(pictures / "one.png")
    (pictures / "notes.txt").write_text("not a picture")
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("a red four\n")
    ran = evaluate_loras(
        lora=str(lora / "pytorch_lora_weights.safetensors"),
        held_out_prompts=held_out,
        subject_prompt="a photo of sks",
        subject_data_dir=pictures,
        pixel_features=True,
        sheet_prompts=0,
    )
    assert ran.code == 0
    assert "| preserved |" in ran.out
    assert ran.out.endswith(f"Wrote {tmp_path / 'out'}\n")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["summary"]) == {"preserved", "held_out", "subject"}
    assert "subject_similarity_tuned" in report["summary"]["subject"]
    assert not (tmp_path / "out" / "sheet.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"knowledge_prompts": "nowhere.txt"}, "got nowhere.txt: no such file."),
        (
            {"subject_data_dir": "nowhere", "pixel_features": True},
            "`--subject_data_dir` must be a folder of pictures, got nowhere",
        ),
        ({"pixel_features": True, "dino": "x"}, "must not be given together with `--dino`"),
        ({"batch_size": 0}, "`--batch_size` must be at least 1, got 0."),
        ({"distribution": True}, "`--distribution` must have features to compare"),
    ],
)
def test_bad_input_on_loras_is_refused_and_leaves_nothing(evaluate_loras, hub, tmp_path, flags, message):
    ran = evaluate_loras(**flags)
    assert (ran.code, ran.out) == (1, "")
    assert message in ran.err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_pictures_and_a_damaged_lora(evaluate_loras, lora, tmp_path):
    (tmp_path / "empty").mkdir()
    ran = evaluate_loras(subject_data_dir=tmp_path / "empty", pixel_features=True)
    assert "`--subject_data_dir` must hold pictures (.png, " in ran.err
    assert f"got none in {tmp_path / 'empty'}" in ran.err
    other = tmp_path / "other.safetensors"
    other.write_bytes((lora / "pytorch_lora_weights.safetensors").read_bytes()[:-4])
    ran = evaluate_loras(lora=other)
    assert ran.code == 1
    assert "error: " in ran.err


def test_arguments_from_a_file(run, digits, prompts, lora, tmp_path, capsys):
    path = tmp_path / "evaluation.yaml"
    values = {"lora": [str(lora)], "knowledge_prompts": str(prompts), "train_batch_size": 3,
              "pretrained_model_name_or_path": str(digits), **PICTURES}  # fmt: skip
    path.write_text(json.dumps(values))
    given = {"config": path, "device": "cpu", "output_dir": tmp_path / "out"}
    ran = run("evaluate", "forgetting", json=True, num_inference_steps=1, **given)
    assert ran.code == 0
    settings = ran.facts["settings"]
    assert (settings["num_inference_steps"], settings["num_images_per_prompt"]) == (1, 2)
    assert settings["lora"] == [str(lora)]
    path.write_text(json.dumps({"loar": "x"}))
    ran = run("evaluate", "forgetting", **given)
    assert ran.code == 2
    assert "must hold known arguments, got ['loar']. Did you mean" in ran.err
    ran = run("evaluate", "forgetting", **{**given, "config": tmp_path / "nowhere.yaml"})
    assert (ran.code, ran.out) == (1, "")
    assert "nowhere.yaml: no such file" in ran.err


DRAWING = {"num_inference_steps": 2, "guidance_scale": 1.5, "num_images_per_prompt": 2}


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a small network and of a tiny CLIP."""
    folder = tmp_path_factory.mktemp("models")
    small_network().save_pretrained(folder / "small")
    return folder / "small", save_tiny_clip(folder / "clip")


@pytest.fixture
def evaluate_noise(run, digits, networks, tmp_path):
    """Run `evaluate golden-noise`."""
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt\na red nine\n# 1\na blue two\n")

    def call(**flags):
        usual = {"pretrained_model_name_or_path": digits, "prompt_file": prompts, "device": "cpu",
                 "output_dir": tmp_path / "out", "noise_model": networks[0], "best_of": 1,
                 "max_prompts": 2, "reward": "clip_score", "reward_model": networks[1]}  # fmt: skip
        given = {**usual, **DRAWING, **flags}
        return run("evaluate", "golden-noise", **{k: v for k, v in given.items() if v is not None})

    return call


def test_the_report_on_noise_is_that_of_the_library(evaluate_noise, digits, networks, tmp_path):
    ran = evaluate_noise(json=True, quiet=True, target_steps=1, redenoise_steps=12)
    assert (ran.code, ran.err) == (0, "")
    pipeline = StableDiffusionPipeline.from_pretrained(digits)
    expected = evaluate_golden_noise(
        pipeline,
        ["a red nine", "# 1"],
        refine={"1-step target": RedenoisedTarget(pipeline, 1, num_steps=12), "small": small_network()},
        rewards=CLIPScoreReward.from_pretrained(networks[1]),
        best_of=1,
        show_progress=False,
        **DRAWING,
    )
    found = GoldenNoiseReport.from_json(tmp_path / "out" / "report.json")
    assert found.rows == expected.rows
    assert ran.facts["scores"] == expected.scores
    assert list(ran.facts["noise"]) == ["standard", "1-step target", "small"]
    assert ran.facts["files"] == ["pictures.csv", "report.json", "sheet.png", "table.md"]
    assert ran.facts["settings"]["noise_model"] == [str(networks[0])]


def test_the_table_is_shown(evaluate_noise, tmp_path):
    ran = evaluate_noise(sheet_prompts=0, max_prompts=1)
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
def test_bad_input_on_noise_is_refused_and_leaves_nothing(evaluate_noise, hub, tmp_path, flags, message):
    ran = evaluate_noise(**flags)
    assert (ran.code, ran.out) == (1, "")
    assert message in ran.err
    assert not (tmp_path / "out").exists()


CLIPS = {"num_inference_steps": 1, "num_frames": 9, "height": 16, "width": 16,
           "guidance_scale": 2.0, "batch_size": 2}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, list[Path], Path]:
    """Folders of a tiny CogVideoX, of two erasers for it, and of a tiny CLIP."""
    folder = tmp_path_factory.mktemp("models")
    return *save_base_and_erasers(folder), save_tiny_clip(folder / "clip")


@pytest.fixture
def evaluate_erasers(run, models, tmp_path):
    """Run `evaluate erasure`."""
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,group,seed\na red seven,target,4\nred two,preserved,\n")

    def call(**flags):
        usual = {"pretrained_model_name_or_path": models[0], "eraser": models[1][0],
                 "evaluation_prompts": prompts, "output_dir": tmp_path / "out", "device": "cpu",
                 "judge": "clip", "judge_model": models[2], "classes": ["seven", "two"],
                 "target_concept": "seven"}  # fmt: skip
        given = {**usual, **CLIPS, **flags}
        return run("evaluate", "erasure", **{k: v for k, v in given.items() if v is not None})

    return call


def test_the_report_on_erasers_is_that_of_the_library(evaluate_erasers, models, tmp_path):
    ran = evaluate_erasers(json=True, kept_clips=1, scale=[0, 1], vae_tiling=True, seed=2)
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
        **CLIPS,
    )
    found = ErasureReport.from_json(tmp_path / "out" / "report.json")
    assert found.rows == expected.rows
    assert all(row["scale 1/drift"] > 0 for row in found.rows)
    assert ran.facts["groups"] == expected.groups
    assert {"clips.csv", "report.json", "sheet.png", "table.md"} < set(ran.facts["files"])
    assert ran.facts["settings"]["eraser"] == [str(models[1][0])]


def test_attacks_are_groups_of_the_report(evaluate_erasers, tmp_path):
    public = tmp_path / "i2p.csv"
    public.write_text("prompt,categories,sd_seed\nseven of them,shocking,12\n")
    attacks = ["scale", "paraphrase", f"prompt_file:{public}", "learned_embeddings"]
    ran = evaluate_erasers(
        attacks=attacks, attack_scale=[0.5], attack_steps=1, num_attack_clips=1, max_attack_prompts=1, json=True
    )
    assert ran.code == 0
    groups = ["attack: paraphrase", "attack: i2p", "attack: scale 0.5", "attack: 16 learned embeddings"]
    assert list(ran.facts["groups"]) == ["target", "preserved", *groups, "all"]
    settings = ran.facts["settings"]
    assert settings["paraphrases"] == ["seven"]
    assert settings["not_covered"][0] == "not asked for: finetune, noise_restart"
    report = ErasureReport.from_json(tmp_path / "out" / "report.json")
    assert [row["seed"] for row in report.rows if row["group"] == "attack: i2p"] == [12]
    assert "| attack: i2p | 1 |" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"eraser": "./nowhere"}, "no such folder"),
        ({"evaluation_prompts": "nowhere.csv"}, "got nowhere.csv: no such file."),
        ({"classes": None}, "`--classes` and `--target_concept` must be given for `--judge clip`"),
        ({"judge": "nudenet"}, "nudenet"),
        ({"fps": 0}, "`--fps` must be in [1, 50], got 0."),
        ({"attacks": ["prompt_file:nowhere.csv"]}, "`--attacks` must be a text file of prompts or a table"),
        ({"attacks": ["paraphrase"], "rewriter": "./nowhere"}, "`--rewriter` must be a local instruct model"),
        ({"attacks": ["scale"], "scale": [0.5, 1]}, "`--scale` must be one scale where there are `--attacks`"),
        ({"kept_clips": -1}, "`--kept_clips` must be at least 0, got -1."),
        ({"concept_aspect": "digit"}, "`--concept_aspect` must be one of"),
    ],
)
def test_bad_input_on_erasers_is_refused_and_leaves_nothing(evaluate_erasers, hub, tmp_path, flags, message):
    ran = evaluate_erasers(**flags)
    assert (ran.code, ran.out) == (1, "")
    assert message in ran.err
    assert not (tmp_path / "out").exists()


def test_another_pipeline_is_refused(evaluate_erasers, digits):
    ran = evaluate_erasers(pretrained_model_name_or_path=digits)
    assert ran.err.startswith("error: `--pretrained_model_name_or_path` must be a ")
    assert "CogVideoXPipeline, got a StableDiffusionPipeline" in ran.err
