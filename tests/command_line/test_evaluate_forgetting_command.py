from __future__ import annotations

import json

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffusers_ext.evaluation.forgetting import ForgettingReport, evaluate_forgetting
from tests.command_line.conftest import PROMPTS

DRAWING = {"num_inference_steps": 2, "guidance_scale": 3.0, "num_images_per_prompt": 2}


@pytest.fixture
def evaluate(run, digits, prompts, lora, tmp_path):
    """Run `evaluate forgetting`."""

    def call(**flags):
        usual = {"pretrained_model_name_or_path": digits, "knowledge_prompts": prompts,
                 "output_dir": tmp_path / "out", "device": "cpu", "lora": lora}  # fmt: skip
        return run("evaluate", "forgetting", **{**usual, **DRAWING, **flags})

    return call


def test_the_report_is_that_of_the_library(evaluate, digits, lora, tmp_path):
    ran = evaluate(json=True, quiet=True, seed=3)
    assert (ran.code, ran.err) == (0, "")
    pipeline = StableDiffusionPipeline.from_pretrained(digits)
    pipeline.load_lora_weights(lora)
    expected = evaluate_forgetting(
        pipeline, None, PROMPTS, seed=3, show_progress=False, **DRAWING
    )  # fmt: skip
    found = ForgettingReport.from_json(tmp_path / "out" / "report.json")
    assert found.rows == expected.rows
    assert ran.facts["summary"] == expected.summary
    assert ran.facts["summary"]["preserved"]["pixel_drift"] > 0
    assert ran.facts["files"] == ["report.json", "sheet.png", "table.md"]
    assert ran.facts["settings"]["lora"] == [str(lora)]
    assert "rows" not in ran.facts


def test_subjects_and_features(evaluate, lora, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (32, 32), "red").save(pictures / "one.png")
    (pictures / "notes.txt").write_text("not a picture")
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("a red four\n")
    ran = evaluate(
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
def test_bad_input_is_refused_and_leaves_nothing(evaluate, hub, tmp_path, flags, message):
    ran = evaluate(**flags)
    assert (ran.code, ran.out) == (1, "")
    assert message in ran.err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_pictures_and_a_damaged_lora(evaluate, lora, tmp_path):
    (tmp_path / "empty").mkdir()
    ran = evaluate(subject_data_dir=tmp_path / "empty", pixel_features=True)
    assert "`--subject_data_dir` must hold pictures (.png, " in ran.err
    assert f"got none in {tmp_path / 'empty'}" in ran.err
    other = tmp_path / "other.safetensors"
    other.write_bytes((lora / "pytorch_lora_weights.safetensors").read_bytes()[:-4])
    ran = evaluate(lora=other)
    assert ran.code == 1
    assert "error: " in ran.err


def test_arguments_from_a_file(run, digits, prompts, lora, tmp_path, capsys):
    path = tmp_path / "evaluation.yaml"
    values = {"lora": [str(lora)], "knowledge_prompts": str(prompts), "train_batch_size": 3,
              "pretrained_model_name_or_path": str(digits), **DRAWING}  # fmt: skip
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
