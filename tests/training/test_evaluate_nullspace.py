from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from diffusers_ext.evaluation.forgetting import ForgettingReport, evaluate_forgetting
from diffusers_ext.families.lora_files import export_lora
from examples.digits.check_model import load_pipeline
from examples.digits.glyph_judge import GlyphJudge
from examples.digits.pictures import draw_glyphs, tint
from examples.digits.prompts import make_tokenizer
from tests.evaluation.test_features import SMALL, write_preprocessing
from tests.training.script_runs import EVALUATED, command_line, files_below, write_prompts
from training.evaluate_nullspace import main, parse_args

HELD_OUT = ("a red four",)
SUBJECT = "a photo of the digit sks"
DRAWING = {"num_inference_steps": 2, "guidance_scale": 3.0, "num_images_per_prompt": 2}
RESULTS = {"report.json", "table.md", "sheet.png"}


def test_the_report_is_that_of_the_library(evaluate, tmp_path, loras):
    found = evaluate(
        held_out_prompts=write_prompts(tmp_path / "held_out.txt", HELD_OUT),
        subject_prompt=SUBJECT,
        judge="tests.training.stub_judges:mentions_seven",
        subject_judge="tests.training.stub_judges:Always",
        seed=3,
        pixel_features=True,
    )
    pipeline = load_pipeline()
    pipeline.load_lora_weights(str(loras[0]))
    expected = evaluate_forgetting(
        pipeline,
        None,
        EVALUATED,
        held_out_prompts=HELD_OUT,
        subject_prompts=[SUBJECT],
        seed=3,
        show_progress=False,
        **DRAWING,
    )
    assert found.drift_floor == 0
    rows = {row["prompt"]: row for row in found.rows}
    assert list(rows) == [*EVALUATED, *HELD_OUT, SUBJECT]
    for row in expected.rows:
        assert rows[row["prompt"]]["pixel_drift"] == row["pixel_drift"] > 1e-3
        assert rows[row["prompt"]]["group"] == row["group"]
    assert rows[EVALUATED[0]]["accuracy_tuned"] == rows[EVALUATED[0]]["accuracy_base"] == 1
    assert rows[EVALUATED[1]]["accuracy_tuned"] == 0
    assert rows[SUBJECT]["accuracy_tuned"] == 1
    assert found.summary["held_out"]["feature_drift"] > 0


def test_files(evaluate, tmp_path, loras):
    report = evaluate(sheet_prompts=1)
    folder = tmp_path / "out"
    assert files_below(folder) == RESULTS
    assert ForgettingReport.from_json(folder / "report.json") == report
    settings = json.loads((folder / "report.json").read_text())["settings"]
    assert settings["lora"] == [str(loras[0])]
    assert (settings["num_inference_steps"], settings["judge"]) == (2, None)
    assert settings["pretrained_model_name_or_path"].endswith("model")
    table = (folder / "table.md").read_text()
    assert table == report.to_table()
    assert all(prompt in table for prompt in EVALUATED)
    sheet = np.asarray(Image.open(folder / "sheet.png"), dtype=np.float32)
    assert sheet.shape[1] > 4 * 96
    assert sheet.std() > 50
    evaluate("no_sheet", sheet_prompts=0)
    assert files_below(tmp_path / "no_sheet") == RESULTS - {"sheet.png"}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_several_loras_act_at_once(evaluate, tmp_path, loras):
    file = tmp_path / "second.safetensors"
    export_lora(loras[1], "kohya", file)
    first, second = (evaluate(lora=lora).rows for lora in (loras[0], file))
    assert evaluate(lora=loras[1]).rows == second
    both = evaluate(several=[loras[0], file])
    pipeline = load_pipeline()
    for index, lora in enumerate(loras):
        pipeline.load_lora_weights(str(lora), adapter_name=str(index))
    pipeline.set_adapters(["0", "1"])
    expected = evaluate_forgetting(pipeline, None, EVALUATED, show_progress=False, **DRAWING)
    assert both.rows == expected.rows
    assert both.settings["adapters"] == ["lora_0", "lora_1"]
    drifts = [rows[0]["pixel_drift"] for rows in (first, second, both.rows)]
    assert len(set(drifts)) == 3


def test_digits_and_glyphs_are_judged(evaluate):
    report = evaluate(
        judge="examples.digits.judge:DigitsJudge",
        subject_judge="examples.digits.glyph_judge:GlyphJudge",
        subject_prompt=SUBJECT,
        num_inference_steps=12,
    )
    assert report.summary["preserved"]["accuracy_base"] == 1
    assert report.summary["subject"]["accuracy_base"] == 0


def test_glyph_judge_asks_for_the_glyph_of_the_token():
    judge = GlyphJudge()
    pictures = [tint(draw_glyphs(name, 1, seed=3)[0], "white") for name in ("triangle", "cross")]
    prompts = ["a photo of the digit sks", "a photo of the digit ohwx"]
    assert judge.correct(np.stack(pictures), prompts).tolist() == [True, True]
    assert judge.correct(np.stack(pictures), prompts[::-1]).tolist() == [False, False]
    for prompt in ("a red seven", "sks and ohwx"):
        with pytest.raises(ValueError, match=f"must hold one of .*'zwx'.*, got '{prompt}'"):
            judge.correct(np.stack(pictures[:1]), [prompt])


@pytest.fixture(scope="module")
def extractors(tmp_path_factory) -> dict[str, Path]:
    """Folders of a small random DINOv2 and a small random CLIP."""
    torch.manual_seed(0)
    dino, clip = (tmp_path_factory.mktemp(name) for name in ("dino", "clip"))
    Dinov2Model(Dinov2Config(**SMALL)).save_pretrained(dino)
    write_preprocessing(dino, "BitImageProcessor", 28)
    tokenizer = make_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = {**SMALL, "intermediate_size": 32}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(clip)
    tokenizer.save_pretrained(clip)
    write_preprocessing(clip, "CLIPImageProcessor", 28)
    return {"dino": dino, "clip": clip}


def test_feature_models_and_distributions(evaluate, tmp_path, extractors):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index, ink in enumerate(draw_glyphs("triangle", 2, seed=1)):
        Image.fromarray(tint(ink, "white")).save(pictures / f"{index}.png")
    report = evaluate(
        **extractors, distribution=True, subject_prompt=SUBJECT, subject_data_dir=pictures, num_images_per_prompt=3
    )
    assert report.settings["features"] == "DINOv2Features"
    assert report.settings["clip"] == str(extractors["clip"])
    preserved = report.summary["preserved"]
    assert -1 <= preserved["score_tuned"] <= 1
    assert -1 <= preserved["subject_similarity_base"] <= 1
    assert report.distribution.keys() == {"preserved"}
    assert report.distribution["preserved"]["mmd"].keys() == {"tuned", "floor"}
    report = evaluate(clip=extractors["clip"])
    assert report.settings["features"] == "CLIPFeatures"


def test_arguments_from_a_file(evaluate, tmp_path, loras):
    path = tmp_path / "nullbooth.yaml"
    block = {"original_knowledge_prompts": str(tmp_path / "known.txt"), "num_denoising_steps": 2,
             "cov_matrices_output_dir": "cov", "collect_features": {"k_features": True}}  # fmt: skip
    values = {"lora": [str(lora) for lora in loras], "guidance_scale": 3, "learning_rate": 1e-4,
              "num_images_per_prompt": 2, "nullbooth": block}  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    by_flags = evaluate(several=loras)
    by_file = main(parse_args(command_line(config=path, output_dir=tmp_path / "file")))
    assert by_file == by_flags


def test_reduced_precision(evaluate):
    report = evaluate(mixed_precision="bf16")
    assert report.summary["preserved"]["pixel_drift"] > 0.01
