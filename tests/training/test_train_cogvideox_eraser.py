from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext.eraser import losses
from diffusers_ext.eraser.files import load_eraser
from diffusers_ext.training.eraser import base as eraser_base
from diffusers_ext.training.eraser import prompts as eraser_text
from diffusers_ext.training.eraser.run import parse_args
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.training.eraser_runs import eraser_line, read_report, train, write_eraser_files
from tests.training.script_runs import files_below

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_eraser_files(tmp_path_factory.mktemp("eraser"))


def weights_of(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_what_a_run_leaves(files, tmp_path):
    validation = {"validation_prompt": "a red seven moving right", "num_validation_videos": 2}
    folder = train(files, tmp_path / "out", **validation, validation_steps=2)
    clips = {f"validation/step-00000{s}-prompt-0-video-{v}.gif" for s in (2, 4) for v in (0, 1)}
    results = {"adapter_config.json", "adapter_model.safetensors", "training_report.json"}
    assert files_below(folder) == clips | results
    with Image.open(folder / sorted(clips)[0]) as clip:
        assert clip.n_frames == 9
    report = read_report(folder)
    assert report["parameters"] == 2 * (2 * 32 * 4 + 4 + 32)
    assert report["recipe"]["rank"] == 4
    assert report["preserved_concepts"] == ["three", "two"]
    assert report["prompts"]["anchor"] == ["a red digit moving right", "the blue digit goes up"]
    assert report["history"][-1]["step"] == 4
    assert math.isfinite(report["history"][-1]["loss"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["concept"], config["anchor_concept"]) == ("seven", "digit")
    assert config["base_model_name_or_path"] == "base"
    pipeline = tiny_video_pipeline()
    load_eraser(pipeline, folder)
    clip = {"num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 12}
    frames = [
        pipeline(
            "a red seven",
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
            attention_kwargs={"scale": scale},
            **clip,
        ).frames
        for scale in (0.0, 1.0)
    ]
    assert not torch.equal(*frames)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_checkpointing": True, "localization_weight": 0.1},
        {"latents_source": "noise", "anchor_concept": None, "localization_weight": 0.1},
        {"mixed_precision": "bf16"},
        {"kind": "linear", "gradient_checkpointing": True, "localization_weight": 0.1},
    ],
    ids=str,
)
def test_variants_learn_finite_weights(arguments, files, tmp_path):
    folder = train(files, tmp_path / "out", **arguments)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in tensors.items() if "eraser_up" in name)


def test_concepts_that_the_text_encoder_chooses_are_written_down(files, tmp_path):
    automatic = {"auto_preserved_concepts": True, "num_preserved_concepts": 2}
    folder = train(files, tmp_path / "out", preserved_concepts_file=None, **automatic)
    lines = (folder / "preserved_concepts.txt").read_text().splitlines()
    chosen = [line for line in lines if not line.startswith("#")]
    assert len(chosen) == 2
    report = read_report(folder)
    assert report["preserved_concepts"] == chosen
    assert f"a red {chosen[0]} moving right" in report["prompts"]["preserved"]


def test_kept_trajectories_give_the_same_eraser_without_sampling(files, tmp_path, monkeypatch):
    kept = {"trajectories_dir": tmp_path / "trajectories"}
    first = train(files, tmp_path / "first", **kept)
    made = files_below(tmp_path / "trajectories")
    assert made
    again = train(files, tmp_path / "again", **kept)
    assert weights_of(first) == weights_of(again)
    with pytest.raises(ValueError, match="three|prompts|facts"):
        train(files, tmp_path / "other", **kept, anchor_concept="number")
    assert files_below(tmp_path / "trajectories") == made
    assert not (tmp_path / "other").exists()


RESUMED = {
    "lr_scheduler": "cosine",
    "gradient_accumulation_steps": 2,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 1,
}


def test_another_run_is_refused_before_weights_are_loaded(files, tmp_path, monkeypatch):
    train(files, tmp_path / "out", **RESUMED)
    monkeypatch.setattr(eraser_text, "load_text_pipeline", None)
    for change, message in (
        ({"guidance_scale": 2.0}, "`recipe.negative_guidance` must be the same"),
        ({"anchor_concept": None}, "`anchor_concept` must be the same"),
        ({"max_train_steps": 1, "lr_scheduler": "constant"}, "must be "),
    ):
        with pytest.raises(ValueError, match=message):
            train(files, tmp_path / "out", **{**RESUMED, **change}, resume_from_checkpoint="latest")


def test_a_loss_that_is_not_a_number_leaves_the_last_checkpoint(files, tmp_path, monkeypatch):
    real, calls = losses.velocity_distance, []

    def fails_later(prediction, *rest):
        calls.append(1)
        return real(prediction, *rest) * (math.nan if len(calls) > 2 * 2 else 1)

    monkeypatch.setattr(losses, "velocity_distance", fails_later)
    with pytest.raises(FloatingPointError, match="The loss must stay finite, got nan"):
        train(files, tmp_path / "out", checkpointing_steps=1, logging_steps=1)
    kept = {path.split("/")[0] for path in files_below(tmp_path / "out")}
    assert kept == {"checkpoint-1", "checkpoint-2"}
    monkeypatch.undo()
    resumed = train(files, tmp_path / "out", checkpointing_steps=1, resume_from_checkpoint="latest")
    whole = train(files, tmp_path / "whole")
    assert weights_of(resumed) == weights_of(whole)


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eraser_rank": 0}, "`rank` must be at least 1, got 0"),
        ({"eraser_rank": 33}, "`eraser_rank` must be at most the model's width, 32, got 33"),
        ({"num_frames": 10}, "`num_frames` must be .* got 10. The nearest is 9"),
        ({"height": 20}, "`height` must be a positive multiple of 8"),
        ({"target_concept": "sch\u00f6n"}, "must be words that the tokenizer can spell"),
        ({"target_concept": " "}, "`target_concept` must be a word or words"),
        ({"target_concept": "nine"}, "must contain 'nine' as a whole word"),
        ({"prompts_file": "absent.txt"}, "no such file"),
        ({"prompts_file": "empty"}, "at least one prompt"),
        ({"preserved_concepts_file": "empty"}, "at least one prompt"),
        ({"preserved_concepts_file": "seven"}, "must not name 'seven', which is erased"),
        ({"preserved_concepts_file": None}, "One of `preserved_concepts_file`, .* must be given"),
        ({"auto_preserved_concepts": True}, "must not be given with `--auto_preserved_concepts`"),
        ({"latents_source": "video"}, "`video_dir` must be a folder of clips"),
        ({"latents_source": "noise", "trajectories_dir": "x"}, "`trajectories_dir` must not be"),
        ({"validation_fps": 0}, "`validation_fps` must be at least 1"),
        ({"empty_share": 2.0}, r"`empty_share` must be in \[0, 1\]"),
        ({"learning_rate": -1.0}, "`learning_rate` must be positive"),
        ({"pretrained_model_name_or_path": Path(__file__).parent}, "must be a folder or Hub name"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_weights_are_loaded(arguments, message, files, tmp_path, monkeypatch):
    monkeypatch.setattr(eraser_text, "load_text_pipeline", None)
    texts = {"empty": "# nothing\n\n", "seven": "three\na seven\n"}
    arguments = {
        name: write(tmp_path / value, texts[value]) if value in texts else value for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        train(files, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "epsilon"}, "`prediction_type` of the scheduler must be 'v_pred"),
        ({"_class_name": "EDMEulerScheduler"}, "the noise levels of `alphas_cumprod`, got a EDM"),
    ],
)
def test_a_scheduler_of_another_kind(files, tmp_path, monkeypatch, change, message):
    real = eraser_base.DDIMScheduler.load_config
    epsilon = SimpleNamespace(load_config=lambda *args, **options: {**real(*args, **options), **change})
    monkeypatch.setattr(eraser_base, "DDIMScheduler", epsilon)
    with pytest.raises(ValueError, match=message):
        train(files, tmp_path / "out")


def test_what_must_be_given(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--output_dir", "out"])
    assert "--target_concept, --prompts_file" in capsys.readouterr().err


def test_upload(files, tmp_path, hub):
    train(
        files, tmp_path / "out", push_to_hub=True, validation_prompt="a red seven",
        trajectories_dir=tmp_path / "out" / "samples", hub_license="mit", checkpointing_steps=4,
        hub_base_model="somebody/video",
    )  # fmt: skip
    sent = hub.files("tester/out")
    clip = "validation/step-000004-prompt-0-video-0.gif"
    results = {"adapter_config.json", "adapter_model.safetensors", "training_report.json"}
    assert sent.keys() == {"README.md", clip} | results
    card = ModelCard(sent["README.md"].decode())
    assert card.data.base_model == "somebody/video"
    assert card.data.widget == [{"text": "a red seven", "output": {"url": clip}}]
    assert "2 prompts that ask for the concept" in card.text
    assert "three" in card.text
    assert str(tmp_path) not in str(card)
    pipeline = tiny_video_pipeline()
    load_eraser(pipeline, "tester/out")
    assert pipeline.transformer.peft_config["default"].concept == "seven"


def test_what_an_upload_lacks_stops_the_run(files, tmp_path, hub, monkeypatch):
    monkeypatch.setattr("diffusers_ext.training.eraser.run.encode_run_text", None)
    with pytest.raises(ValueError, match="`license` must be given, got None"):
        train(files, tmp_path / "out", push_to_hub=True)
    with pytest.raises(ValueError, match="`hub_token` must be a token of the Hub"):
        train(files, tmp_path / "out", push_to_hub=True, hub_license="mit", hub_token="hf_wrong")
    assert not hub.repos


def test_the_command_line_of_the_tests_is_that_of_users(files, tmp_path):
    args = parse_args(eraser_line(files, tmp_path, eraser_rank=None, learning_rate=None))
    assert (args.rank, args.learning_rate, args.negative_guidance) == (128, 1e-4, 0.5)
