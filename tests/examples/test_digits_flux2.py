"""The digits' FLUX.2: an ordinary folder of weights that draws what it is asked for, and the script it comes from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline, Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_ext.evaluation.rendering import Sampling, shots_of
from diffusers_ext.evaluation.rendering import draw as draw_shots
from diffusers_ext.families import find_family
from diffusers_ext.nullspace.text_only import text_only_linears
from diffusers_ext.training.nullspace.data import draw_images
from examples.digits import train_model
from examples.digits.check_model import MODEL_DIR as BASE_DIR
from examples.digits.check_model import draw, load_pipeline
from examples.digits.judge import DigitsJudge
from examples.digits.prompts import HELD_OUT_PAIRS, HELD_OUT_TEMPLATE, TRAINING_PAIRS, prompt_pairs
from examples.digits_flux2.networks import build_pipeline, normalized_patches
from examples.digits_flux2.pipeline import CLIP_TAKES_USE_CACHE, MODEL_DIR, DigitsFlux2Pipeline
from tests.examples.model_folders import model_files
from tests.tiny_current_pipelines import tiny_flux2_pipeline

needs_transformers_5 = pytest.mark.skipif(
    not CLIP_TAKES_USE_CACHE, reason="the text encoder of the digits' FLUX.2 needs transformers 5"
)
STOCK_CALL = {"height": 32, "width": 32, "max_sequence_length": 16, "text_encoder_out_layers": (2,)}


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(MODEL_DIR)


@pytest.fixture(scope="module")
def stock():
    """As anyone loads it."""
    loaded = DiffusionPipeline.from_pretrained(MODEL_DIR)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def few_digits(monkeypatch):
    """A few of the pictures, so that encoding them takes no time."""

    class FewDigits(train_model.TintedDigits):
        def __init__(self) -> None:
            super().__init__()
            self.entries = self.entries[::400]

    monkeypatch.setattr(train_model, "TintedDigits", FewDigits)


def weights_of(folder, part):
    return load_file(next((folder / part).glob("*.safetensors")))


def test_what_is_new_is_small_and_in_half_precision():
    path = MODEL_DIR / "transformer" / "diffusion_pytorch_model.safetensors"
    assert path.stat().st_size <= 4 * 10**6
    with safe_open(path, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}
    assert sum(path.stat().st_size for path in MODEL_DIR.rglob("*") if path.is_file()) <= 6 * 10**6


def test_autoencoder_and_text_encoder_are_those_of_the_digits():
    assert all(
        torch.equal(tensor, weights_of(BASE_DIR, "text_encoder")[name])
        for name, tensor in weights_of(MODEL_DIR, "text_encoder").items()
    )
    ours, theirs = weights_of(MODEL_DIR, "vae"), weights_of(BASE_DIR, "vae")
    assert {name for name in ours if name not in theirs} == {
        "bn.running_mean",
        "bn.running_var",
        "bn.num_batches_tracked",
    }
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


def test_transformers_4_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("examples.digits_flux2.pipeline.CLIP_TAKES_USE_CACHE", False)
    with pytest.raises(ValueError, match="`transformers` must be 5.0 or newer for the digits' FLUX.2, .* got"):
        load_pipeline(MODEL_DIR)


@needs_transformers_5
def test_it_is_an_ordinary_flux2_pipeline(stock, pipeline):
    assert type(stock) is Flux2KleinPipeline
    assert type(stock.transformer) is Flux2Transformer2DModel
    assert type(stock.vae) is AutoencoderKLFlux2
    pictures = [
        model(prompt="a red three", num_inference_steps=2, generator=torch.Generator().manual_seed(0), **call).images[
            0
        ]
        for model, call in ((stock, STOCK_CALL), (pipeline, {}))
    ]
    assert pictures[0].size == (32, 32)
    assert np.array_equal(*map(np.asarray, pictures))


@needs_transformers_5
def test_prompts_are_read_up_to_what_the_text_encoder_knows(pipeline):
    embeds, ids = pipeline.encode_prompt("a red three")
    assert (embeds.shape, ids.shape) == ((1, 16, 128), (1, 16, 4))
    assert pipeline.encode_prompt("a red three", text_encoder_out_layers=(1, 2))[0].shape == (1, 16, 256)
    assert pipeline.encode_prompt("a red three", max_sequence_length=8)[0].shape == (1, 8, 128)


@needs_transformers_5
def test_tools_read_the_stock_pipeline_as_its_text_encoder_asks(stock, pipeline):
    family = find_family(stock)
    assert family.text_call(stock) == {"max_sequence_length": 16, "text_encoder_out_layers": (2,)}
    assert family.text_call(tiny_flux2_pipeline()) == {}
    text = family.encode(stock, ["a red three"], None)
    assert torch.equal(text.prompt_embeds, pipeline.encode_prompt("a red three")[0])
    assert text_only_linears(stock) == {"context_embedder": "text"}


@needs_transformers_5
def test_pictures_of_validation_and_evaluation_are_drawn_by_the_stock_pipeline(stock, pipeline):
    run, shots = {"num_inference_steps": 2, "guidance_scale": 3.0}, shots_of(["a red three"], 1, 5)
    ours, theirs = (draw_images(model, ["a red three"], [5], 32, **run) for model in (pipeline, stock))
    assert np.array_equal(*(np.asarray(pictures[0]) for pictures in (ours, theirs)))
    sampling = Sampling(**run, height=32, width=32)
    assert torch.equal(draw_shots(pipeline, shots, sampling), draw_shots(stock, shots, sampling))


@needs_transformers_5
def test_patches_have_unit_variance_and_the_pipeline_turns_them_back():
    made = build_pipeline(load_pipeline(BASE_DIR))
    latents = 3 * torch.randn(50, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 1
    patches = normalized_patches(made, latents)
    assert patches.shape == (50, 2, 16, 4, 4)
    assert patches.mean(dim=(0, 1, 3, 4)) == pytest.approx(np.zeros(16), abs=1e-5)
    assert patches.var(dim=(0, 1, 3, 4)) == pytest.approx(np.ones(16), abs=1e-3)
    packed = made._pack_latents(patches.flatten(0, 1))
    restored = made(
        prompt=[""] * 100, latents=patches.flatten(0, 1), num_inference_steps=1, sigmas=[0.0], guidance_scale=1.0,
        output_type="latent",
    ).images  # fmt: skip
    assert packed.shape == (100, 16, 16)
    assert torch.allclose(restored, latents.flatten(0, 1), atol=1e-4)


@needs_transformers_5
def test_it_draws_what_it_is_asked_for(pipeline):
    prompts = prompt_pairs(HELD_OUT_TEMPLATE, (*TRAINING_PAIRS, *HELD_OUT_PAIRS))
    assert DigitsJudge().correct(draw(pipeline, prompts, seed=123), prompts).mean() >= 0.94


@needs_transformers_5
def test_negative_prompts_reach_the_model(pipeline):
    call = {"seed": 5, "num_inference_steps": 2}
    plain, same, other = (
        np.asarray(draw(pipeline, ["a red three"], negative_prompt=negative, **call)[0])
        for negative in (None, "", "a blue one")
    )
    assert np.array_equal(plain, same)
    assert not np.array_equal(plain, other)


def test_the_log_of_the_bundled_weights_is_kept():
    log = json.loads((MODEL_DIR.parent / "train_log.json").read_text())
    assert log["seconds"]["processor"] <= 2 * 30 * 60
    assert log["denoiser"][-1]["step"] == int(log["arguments"]["max_train_steps"])
    assert log["denoiser"][-1]["loss"] < log["denoiser"][0]["loss"] / 2


@pytest.mark.usefixtures("fresh_accelerator", "few_digits")
@pytest.mark.parametrize(
    ("architecture", "folder"),
    [pytest.param("flux2", MODEL_DIR, marks=needs_transformers_5), ("stable_diffusion", BASE_DIR)],
)
def test_the_training_script_writes_such_folders(tmp_path, architecture, folder):
    line = ["--architecture", architecture, "--vae_steps", "1", "--max_train_steps", "2"]
    train_model.main(train_model.parse_args([*line, "--output_dir", str(tmp_path / "model")]))
    assert model_files(tmp_path / "model") == model_files(folder)
    log = json.loads((tmp_path / "train_log.json").read_text())
    assert log["denoiser"][-1]["step"] == 2
    assert log["arguments"]["architecture"] == architecture
    made = load_pipeline(tmp_path / "model")
    assert isinstance(made, DigitsFlux2Pipeline) is (architecture == "flux2")
    made("a red three", num_inference_steps=1) if architecture != "flux2" else made(prompt="a red three")
