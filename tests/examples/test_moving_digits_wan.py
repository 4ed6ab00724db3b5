"""The moving digits' Wan: an ordinary folder of weights that draws what it is asked for, and where it comes from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors import safe_open
from transformers import UMT5EncoderModel

from examples.moving_digits import train_model
from examples.moving_digits.check_model import MODEL_DIR as BASE_DIR
from examples.moving_digits.check_model import WAN_DIR, draw, load_pipeline, rates, spread
from examples.moving_digits.clips import MovingDigits, to_pixels
from examples.moving_digits.judge import MovingDigitsJudge
from examples.moving_digits.prompts import HELD_OUT_TEMPLATE, PROMPT_LENGTH, write_prompts
from examples.moving_digits_wan.networks import TextToVelocity, build_vae, decode, normalize, to_umt5
from tests.examples.model_folders import model_files


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(WAN_DIR)


def test_the_folder_is_small_and_holds_half_precision_weights_only():
    files = [path for path in WAN_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4 * 10**6
    weights = [path for path in files if path.suffix != ".json"]
    assert {path.parent.name for path in weights} == {"vae", "transformer", "text_encoder"}
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}


def test_it_is_an_ordinary_wan_pipeline(pipeline):
    assert type(pipeline) is WanPipeline
    assert type(pipeline.vae) is AutoencoderKLWan
    assert type(pipeline.transformer) is WanTransformer3DModel
    assert type(pipeline.text_encoder) is UMT5EncoderModel
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    assert pipeline.transformer.config.patch_size == [1, 2, 2]


def test_anyone_draws_with_it_as_it_loads():
    stock = DiffusionPipeline.from_pretrained(WAN_DIR)
    stock.set_progress_bar_config(disable=True)
    call = {"num_frames": 9, "height": 16, "width": 16, "max_sequence_length": PROMPT_LENGTH}
    frames = stock("a red three moving right", num_inference_steps=1, **call).frames
    assert frames.shape == (1, 9, 16, 16, 3)


def test_it_reads_prompts_as_the_moving_digits_do(pipeline):
    text_encoder = load_pipeline().text_encoder
    tokens = pipeline.tokenizer(["a red three moving right", ""], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        theirs = text_encoder(**tokens).last_hidden_state
        assert torch.equal(to_umt5(text_encoder)(**tokens).last_hidden_state, theirs)
        assert torch.equal(pipeline.text_encoder(**tokens).last_hidden_state, theirs)
    ids = [load_pipeline(path).tokenizer("a red three, q").input_ids for path in (BASE_DIR, WAN_DIR)]
    assert ids[0] == ids[1]


def test_latents_have_unit_variance_in_each_channel(pipeline):
    latents, _ = train_model.encode_some(pipeline.vae, MovingDigits(), 64, seed=5)
    assert latents.shape == (64, 3, 16, 4, 4)
    config = pipeline.vae.config
    assert latents.mean(dim=(0, 1, 3, 4)) == pytest.approx(config.latents_mean, abs=0.3 * max(config.latents_std))
    assert latents.std(dim=(0, 1, 3, 4)) == pytest.approx(config.latents_std, rel=0.15)


def test_the_pipeline_turns_normalized_latents_back(pipeline):
    vae = build_vae().eval()
    latents = 3 * torch.randn(20, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0)) + 1
    normalized = normalize(vae, latents)
    assert normalized.mean(dim=(0, 1, 3, 4)) == pytest.approx(np.zeros(16), abs=1e-5)
    assert normalized.std(dim=(0, 1, 3, 4)) == pytest.approx(np.ones(16), abs=1e-5)
    with torch.no_grad():
        straight = vae.decode(latents.transpose(1, 2)).sample
        mean, std = (torch.tensor(vae.config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
        assert torch.allclose(vae.decode((normalized * std + mean).transpose(1, 2)).sample, straight, atol=1e-5)


def test_pixels_beyond_the_range_have_a_gradient():
    vae = build_vae()
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(5.0)
    latents = torch.zeros(1, 16, 3, 4, 4, requires_grad=True)
    clip = decode(vae, latents)
    assert clip.shape == (1, 3, 9, 16, 16)
    assert clip.min() > 1.0
    assert torch.equal(clip.clamp(-1, 1), vae.decode(latents).sample)
    clip.sum().backward()
    assert latents.grad.abs().sum() > 0
    assert not vae.decoder._forward_hooks


def test_the_loss_is_that_of_flow_matching(pipeline):
    model = TextToVelocity(pipeline)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 3, 16, 4, 4, generator=generator) for _ in range(2))
    times, prompts = torch.tensor([0.25, 0.75]), ["a red three moving right", ""]
    with torch.no_grad():
        text, _ = pipeline.encode_prompt(prompts, None, False, max_sequence_length=PROMPT_LENGTH)
        noisy = torch.stack([0.75 * clean[0] + 0.25 * noise[0], 0.25 * clean[1] + 0.75 * noise[1]])
        velocity = pipeline.transformer(noisy.transpose(1, 2), torch.tensor([250.0, 750.0]), text).sample
        expected = ((velocity.transpose(1, 2) - (noise - clean)) ** 2).mean()
        assert model(clean, noise, times, prompts).item() == pytest.approx(expected.item(), rel=1e-5)
    drawn = model.draw_times(4000, generator)
    assert drawn.logit().mean() == pytest.approx(0, abs=0.06)
    assert drawn.logit().std() == pytest.approx(1, abs=0.06)


def test_the_autoencoder_keeps_what_clips_show(pipeline):
    digits = MovingDigits()
    entries = [digits[index] for index in range(0, len(digits), len(digits) // 40)]
    clips = to_pixels(np.stack([digits.clip(entry) for entry in entries]))
    with torch.no_grad():
        restored = pipeline.vae.decode(pipeline.vae.encode(clips).latent_dist.mode()).sample
    frames = ((restored.permute(0, 2, 3, 4, 1).numpy() + 1) * 127.5).round().astype(np.uint8)
    read, shown = MovingDigitsJudge().read(frames), [digits.combinations[entry[1]] for entry in entries]
    assert np.mean([d == s[1] for d, s in zip(read.digits, shown, strict=True)]) >= 0.9
    assert list(zip(read.colors, read.directions, strict=True)) == [(s[0], s[2]) for s in shown]


def test_it_draws_what_it_is_asked_for(pipeline):
    prompts = spread(write_prompts(templates=(HELD_OUT_TEMPLATE,)), 40)
    assert rates(MovingDigitsJudge(), draw(pipeline, prompts, seed=3), prompts)["all"] >= 0.85


@pytest.mark.usefixtures("fresh_accelerator")
def test_the_training_script_writes_such_a_folder(tmp_path):
    line = ["--vae_steps", "2", "--decoder_steps", "1", "--clips", "64", "--max_train_steps", "2", "--seed", "1"]
    folder = tmp_path / "model"
    train_model.main(train_model.parse_args(["--architecture", "wan", *line, "--output_dir", str(folder)]))
    assert model_files(folder) == model_files(WAN_DIR)
    log = json.loads((tmp_path / "train_log.json").read_text())
    assert {part: len(run["history"]) for part, run in log.items()} == {
        "autoencoder": 1,
        "decoder": 1,
        "transformer": 1,
    }
    assert load_pipeline(folder).vae.config.latents_std != [1.0] * 16


def test_the_log_of_the_bundled_weights_is_kept():
    log = json.loads((WAN_DIR.parent / "train_log.json").read_text())
    assert set(log) == {"autoencoder", "decoder", "transformer"}
    assert {part["threads"] for part in log.values()} == {1}
    assert sum(part["seconds"] for part in log.values()) <= 2 * 45 * 60  # of one core
    assert log["transformer"]["history"][-1]["loss"] < log["transformer"]["history"][0]["loss"] / 2
