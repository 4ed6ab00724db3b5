"""The bundled moving-digits model: an ordinary folder of weights that draws what it is asked for."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors import safe_open
from transformers import T5EncoderModel

from examples.moving_digits import train_denoiser, train_model
from examples.moving_digits.check_model import MODEL_DIR, draw, load_pipeline, spread
from examples.moving_digits.clips import MovingDigits
from examples.moving_digits.judge import MovingDigitsJudge
from examples.moving_digits.prompts import COMBINATIONS, PROMPT_LENGTH, TEMPLATES, read_prompt
from tests.examples.model_folders import model_files


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def test_the_folder_is_small_and_holds_half_precision_weights_only():
    files = [path for path in MODEL_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    weights = [path for path in files if path.suffix != ".json"]
    assert {path.parent.name for path in weights} == {"vae", "transformer", "text_encoder"}
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}


def test_it_is_an_ordinary_cogvideox_pipeline(pipeline):
    assert type(pipeline) is CogVideoXPipeline
    assert type(pipeline.vae) is AutoencoderKLCogVideoX
    assert type(pipeline.transformer) is CogVideoXTransformer3DModel
    assert type(pipeline.text_encoder) is T5EncoderModel
    assert type(pipeline.scheduler) is CogVideoXDDIMScheduler
    assert pipeline.transformer.config.max_text_seq_length == PROMPT_LENGTH
    assert pipeline.transformer.config.use_rotary_positional_embeddings


def test_the_schedule_ends_in_pure_noise(pipeline):
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
    pipeline.scheduler.set_timesteps(20)
    assert pipeline.scheduler.timesteps[0] == 999


def test_latents_have_unit_variance(pipeline):
    factor = pipeline.vae.config.scaling_factor
    digits = MovingDigits()
    latents, _ = train_model.encode_some(pipeline.vae, digits, 32, seed=5)
    assert 1.0 / latents.std().item() == pytest.approx(factor, rel=0.1)
    assert latents.shape == (32, 3, 16, 4, 4)


def test_it_draws_what_it_is_asked_for(pipeline):
    asked = spread(
        [
            template.format(color=color, digit=digit, direction=direction)
            for template in TEMPLATES
            for color, digit, direction in COMBINATIONS
        ],
        20,
    )
    found = MovingDigitsJudge().correct(draw(pipeline, asked, seed=3), asked)
    right = found["digit"].data & found["color"].data & found["direction"].data
    assert right.sum() >= 16


def test_captions_say_what_clips_show_or_less():
    chosen = [COMBINATIONS[i % len(COMBINATIONS)] for i in range(400)]
    captions = train_denoiser.caption(chosen, torch.Generator().manual_seed(0))
    for combination, text in zip(chosen, captions, strict=True):
        read = read_prompt(text)
        assert all(word in (None, true) for word, true in zip(read, combination, strict=True))
    assert 20 <= captions.count("") <= 60
    assert 20 <= sum(" digit" in text for text in captions) <= 60
    assert 20 <= sum("colored" in text for text in captions) <= 60


@pytest.mark.usefixtures("fresh_accelerator")
def test_the_training_script_writes_such_a_folder(tmp_path):
    line = ["--vae_steps", "2", "--clips", "64", "--max_train_steps", "2", "--seed", "1"]
    folder = tmp_path / "model"
    train_model.main(train_model.parse_args([*line, "--output_dir", str(folder)]))
    assert model_files(folder) == model_files(MODEL_DIR)
    log = json.loads((tmp_path / "train_log.json").read_text())
    assert set(log) == {"autoencoder", "transformer"}
    assert log["transformer"]["history"][-1]["step"] == 2
    assert log["transformer"]["arguments"]["clips"] == 64
    pipeline = load_pipeline(folder)
    assert pipeline.transformer.config.num_layers == 4
    assert pipeline.vae.config.scaling_factor != 1.0


def test_the_log_of_the_bundled_weights_is_kept():
    log = json.loads((MODEL_DIR.parent / "train_log.json").read_text())
    assert sum(part["seconds"] for part in log.values()) <= 60 * 60
    for part in log.values():
        assert part["history"][-1]["loss"] < part["history"][0]["loss"] / 2
