from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from diffusers_ext.evaluation.forgetting import evaluate_forgetting
from diffusers_ext.evaluation.forgetting_report import ForgettingReport
from diffusers_ext.nullspace.lora_files import LORA_WEIGHT_NAME, export_lora
from examples.digits.check_model import load_pipeline
from examples.digits.glyph_judge import GlyphJudge
from examples.digits.pictures import draw_glyphs, tint
from examples.digits.prompts import make_tokenizer
from tests.evaluation.test_features import SMALL, write_preprocessing
from tests.tiny_lora import add_random_lora
from tests.training.script_runs import command_line, files_below, write_prompts
from training import evaluate_nullspace
from training.evaluate_nullspace import main, parse_args


KNOWN = ("a photo of the red digit seven", "a blue three")
HELD_OUT = ("a red four",)
SUBJECT = "a photo of the digit sks"
QUICK = {"num_inference_steps": 2, "guidance_scale": 3.0, "num_images_per_prompt": 2}
RESULTS = {"report.json", "table.md", "sheet.png"}


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> list[Path]:
    """Folders of two random LoRAs for the digits model."""
    folders = []
    for seed in (1, 2):
        pipeline = load_pipeline()
        add_random_lora(pipeline.unet, ["attn2.to_k", "attn2.to_v"], seed=seed)
        folders.append(tmp_path_factory.mktemp(f"lora_{seed}"))
        layers = get_peft_model_state_dict(pipeline.unet)
        pipeline.save_lora_weights(folders[-1], unet_lora_layers=layers)
    return folders


@pytest.fixture
def evaluate(tmp_path, loras):
    """Run the script in this process; returns its report."""

    def run(name: str = "out", **arguments) -> ForgettingReport:
        arguments = {
            "knowledge_prompts": write_prompts(tmp_path / "known.txt", KNOWN),
            "lora": loras[0],
            **QUICK,
            **arguments,
        }
        several = arguments.pop("loras", None)
        line = command_line(**{"output_dir": tmp_path / name, **arguments})
        for lora in several or ():
            line += ["--lora", str(lora)]
        return main(parse_args(line))

    return run


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
        KNOWN,
        held_out_prompts=HELD_OUT,
        subject_prompts=[SUBJECT],
        seed=3,
        show_progress=False,
        **QUICK,
    )
    assert found.drift_floor == 0
    rows = {row["prompt"]: row for row in found.rows}
    assert list(rows) == [*KNOWN, *HELD_OUT, SUBJECT]
    for row in expected.rows:
        assert rows[row["prompt"]]["pixel_drift"] == row["pixel_drift"] > 1e-3
        assert rows[row["prompt"]]["group"] == row["group"]
    assert rows[KNOWN[0]]["accuracy_tuned"] == rows[KNOWN[0]]["accuracy_base"] == 1
    assert rows[KNOWN[1]]["accuracy_tuned"] == 0
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
    assert all(prompt in table for prompt in KNOWN)
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
    both = evaluate(lora=None, loras=[loras[0], file])
    pipeline = load_pipeline()
    for index, lora in enumerate(loras):
        pipeline.load_lora_weights(str(lora), adapter_name=str(index))
    pipeline.set_adapters(["0", "1"])
    expected = evaluate_forgetting(pipeline, None, KNOWN, show_progress=False, **QUICK)
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
        **extractors,
        distribution=True,
        subject_prompt=SUBJECT,
        subject_data_dir=pictures,
        num_images_per_prompt=3,
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
    by_flags = evaluate(lora=None, loras=loras)
    by_file = main(parse_args(command_line(config=path, output_dir=tmp_path / "file")))
    assert by_file == by_flags


def test_reduced_precision(evaluate):
    report = evaluate(mixed_precision="bf16")
    assert report.summary["preserved"]["pixel_drift"] > 0.01


def lora_file(folder: Path, source: Path, change) -> Path:
    tensors = load_file(source / LORA_WEIGHT_NAME)
    save_file(change(tensors), folder / "changed.safetensors", metadata={"format": "pt"})
    return folder / "changed.safetensors"


def zero_b(tensors: dict) -> dict:
    return {key: t * 0 if "lora_B" in key else t for key, t in tensors.items()}


def other_names(tensors: dict) -> dict:
    return {key.replace("unet.", "transformer."): tensor for key, tensor in tensors.items()}


def wider(tensors: dict) -> dict:
    return {key: t.repeat(1, 2) if "lora_A" in key else t for key, t in tensors.items()}


@pytest.mark.parametrize("change", [zero_b, other_names, wider])
def test_loras_that_do_not_act_on_the_model_are_refused(evaluate, tmp_path, loras, change):
    path = lora_file(tmp_path, loras[0], change)
    with pytest.raises(ValueError, match=r"must be a LoRA for this model, got .*changed.sa"):
        evaluate(lora=None, loras=[loras[0], path])
    assert not (tmp_path / "out").exists()


def prompts_of(folder: Path, *prompts: str) -> Path:
    return write_prompts(folder / "other.txt", prompts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda _: {"lora": "nowhere"}, f"folder with {LORA_WEIGHT_NAME} or a file, got nowhere"),
        (lambda _: {"knowledge_prompts": "nowhere.txt"}, "got nowhere.txt: no such file"),
        (lambda f: {"held_out_prompts": prompts_of(f)}, "must hold at least one prompt"),
        (lambda f: {"held_out_prompts": prompts_of(f, KNOWN[1])}, "must not be among `prompts`"),
        (lambda _: {"judge": "tests.nowhere:judge"}, "`judge` must name a module"),
        (lambda _: {"judge": "tests.training.stub_judges:one_number"}, "one finite bool per image"),
        (
            lambda _: {"subject_judge": "tests.training.stub_judges:Always"},
            "`subject_prompts` must be given for a `subject_judge`",
        ),
        (lambda _: {"distribution": True}, "`distribution` must have features"),
        (lambda f: {"subject_data_dir": f}, "`subject_data_dir` must have features"),
        (
            lambda f: {"subject_data_dir": f / "x", "pixel_features": True},
            "`subject_data_dir` must be a folder of pictures",
        ),
        (lambda _: {"dino": "a/b", "pixel_features": True}, "`pixel_features` must not be given"),
        (lambda _: {"num_inference_steps": 0}, "`num_inference_steps` must be at least 1, got 0"),
        (lambda _: {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        (lambda _: {"output_dir": __file__}, "`output_dir` must be a folder, got .*py"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(evaluate, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate("out", **arguments(tmp_path))
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(evaluate, tmp_path, monkeypatch):
    several = SimpleNamespace(num_processes=2)
    monkeypatch.setattr(evaluate_nullspace, "make_accelerator", lambda _: several)
    with pytest.raises(ValueError, match="must be one process, got 2. Pass `--num_processes 1`"):
        evaluate()
    assert not (tmp_path / "out").exists()
