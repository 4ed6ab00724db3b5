from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.golden_noise.networks.npnet import NPNet
from diffusers_ext.golden_noise.pairs.dataset import source_noise
from tests.training.noise_runs import read_report, train
from tests.training.noise_sets import PROMPTS, SHAPE, digits_facts, write_noises

WEIGHTS = "diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_noises(tmp_path_factory.mktemp("noises") / "pairs", facts=digits_facts())


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    return write_noises(tmp_path_factory.mktemp("noises") / "sequences", 3)


def test_the_loss_falls_far_below_the_identity_also_on_held_out_prompts(pairs, tmp_path):
    folder = train("golden_noise_model", pairs, tmp_path / "out", max_train_steps=50, validation_steps=25)
    report = read_report(folder)
    first, last = report["history"][0], report["history"][-1]
    assert first["relative"] > 0.3 > 0.05 > last["relative"]
    assert last["cosine"] > 0.97
    assert [entry["step"] for entry in report["validation"]] == [25, 50]
    figures = report["validation"][-1]
    assert figures["train_relative"] < 0.05
    assert figures["validation_relative"] < 0.3
    assert figures["validation_cosine"] > 0.9
    assert report["data"]["validation_samples"] == 8
    assert report["text"]["text_embed_dim"] == 128
    network = load_noise_model(folder)
    assert type(network).__name__ == report["network"] == "GoldenNoiseModel"
    assert report["parameters"] == sum(p.numel() for p in network.parameters())


def test_npnet_learns_too(pairs, tmp_path):
    report = read_report(train("npnet", pairs, tmp_path / "out", max_train_steps=40))
    assert report["history"][-1]["relative"] < 0.7
    assert report["validation"][-1]["train_cosine"] > 0.5
    assert report["config"]["text_length"] == 16


def test_each_sample_has_its_own_prompt(pairs, tmp_path):
    """The changes of the two colours are opposite: one text for a whole batch could not tell them."""
    folder = train("golden_noise_model", pairs, tmp_path / "out", max_train_steps=50)
    report, network = read_report(folder), load_noise_model(folder)
    assert report["history"][-1]["relative"] < 0.05
    assert network.config.text_embed_dim == 128


def test_averaged_weights_are_what_is_saved_and_measured(pairs, tmp_path):
    run = {"max_train_steps": 8, "checkpointing_steps": 8}
    plain = train("golden_noise_model", pairs, tmp_path / "plain", **run)
    averaged = train("golden_noise_model", pairs, tmp_path / "ema", use_ema=True, **run)
    trained = [load_file(f / "checkpoint-8" / "trained_0.safetensors") for f in (plain, averaged)]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert all(torch.equal(trained[0][k], v) for k, v in load_file(plain / WEIGHTS).items())
    saved = load_file(averaged / WEIGHTS)
    assert not torch.equal(saved["head.weight"], trained[1]["head.weight"])
    figures = [read_report(folder)["validation"][-1] for folder in (plain, averaged)]
    assert figures[0]["train_relative"] != figures[1]["train_relative"]
    assert read_report(plain)["history"] == read_report(averaged)["history"]


@pytest.mark.parametrize(
    ("model", "structure"),
    [
        ("npnet", {"svd_dropout": True, "nt_adapter": True, "nt_finetune": True}),
        ("npnet", {"nt_dropout": True, "cross_attention": True, "svd_signs": "backend"}),
        ("golden_noise_model", {"patch_size": 4, "width": 64, "num_layers": 1, "num_heads": 4}),
    ],
)
def test_each_flag_reaches_the_config(model, structure, pairs, tmp_path):
    folder = train(model, pairs, tmp_path / "out", max_train_steps=1, **structure)
    config = load_noise_model(folder).config
    assert {name: config[name] for name in structure} == structure
    assert (config.in_channels, config.sample_size) == (4, 8)


def test_frozen_layers_stay(pairs, tmp_path):
    swin = {"swin_depths": [1, 1, 1], "swin_num_heads": [1, 1, 2], "swin_image_size": 64}
    run = {**swin, "nt_finetune": True}
    first, second = (
        load_file(train("npnet", pairs, tmp_path / str(n), max_train_steps=n, **run) / WEIGHTS) for n in (1, 3)
    )
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert any("swin.encoder.layers.2" in name for name in changed)
    assert not any("swin.encoder.layers.0" in name for name in changed)
    assert "alpha" in changed


def test_epochs_are_counted_in_samples(pairs, tmp_path):
    run = {"max_train_steps": None, "num_epochs": 2, "gradient_accumulation_steps": 2}
    report = read_report(train("golden_noise_model", pairs, tmp_path / "out", **run))
    assert report["arguments"]["max_train_steps"] == 3  # 24 samples in batches of 2 x 8
    assert report["history"][-1]["step"] == 3


def test_a_saved_network_goes_on(pairs, tmp_path):
    first = train("golden_noise_model", pairs, tmp_path / "first", max_train_steps=30)
    second = train(
        "golden_noise_model", pairs, tmp_path / "second", max_train_steps=2, init_from=first,
        patch_size=None, width=None, num_layers=None, num_heads=None, logging_steps=1,
    )  # fmt: skip
    before = read_report(first)["validation"][-1]["train_relative"]
    assert read_report(second)["history"][0]["relative"] < 2 * before < 0.5


def test_the_last_step_of_sequences_is_the_target(sequences, tmp_path):
    last, named, other = (
        train("golden_noise_model", sequences, tmp_path / str(step), target_step=step) for step in ("last", 3, 1)
    )
    assert (last / WEIGHTS).read_bytes() == (named / WEIGHTS).read_bytes()
    assert (last / WEIGHTS).read_bytes() != (other / WEIGHTS).read_bytes()
    assert read_report(other)["data"]["steps"] == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_embed_dim": 2048}, "`text_embed_dim` must be the base model's 128, got 2048"),
        ({"npnet_model_id": "SDXL"}, "must be of the base model's family, got SDXL with text 2048"),
        ({"noise_resolution": 128}, "must be that of the data, 8 x 8, got 128"),
        ({"target_step": 2}, "`target_step` must be 'last' or from 1 to the data's 1, got 2"),
        ({"dataset_dir": "/nowhere"}, "`dataset_dir` must be a folder or Hub name of noise pairs, got /n"),
        ({"svd_dropout": True}, "`svd_dropout` must not be given with `--model golden_noise_model`"),
        ({"width": 8}, "`width` must be at least the 16 numbers of a patch, got 8"),
        ({"ema_decay": 1.0}, r"`ema_decay` must be in \[0, 1\), got 1.0"),
        ({"num_epochs": 0}, "`num_epochs` must be at least 1, got 0"),
        ({"init_from": "weights.pth"}, "must be a folder or Hub name"),
        ({"pretrained_model_name_or_path": "tests"}, "must be a folder or Hub name of a pipeline"),
    ],
)  # fmt: skip
def test_bad_input(arguments, message, pairs, tmp_path):
    with pytest.raises(ValueError, match=message):
        train("golden_noise_model", arguments.pop("dataset_dir", pairs), tmp_path / "o", **arguments)
    assert not (tmp_path / "o").exists()


def test_a_network_for_other_latents_or_text_is_refused(pairs, tmp_path):
    other = write_noises(tmp_path / "other", shape=(16, 8, 8))
    network = train("golden_noise_model", other, tmp_path / "network", width=64)
    with pytest.raises(ValueError, match="with `in_channels` = 4, got 16"):
        train("golden_noise_model", pairs, tmp_path / "out", init_from=network, width=None)
    with pytest.raises(ValueError, match="must be a NPNet for `--model npnet`, got a GoldenNoise"):
        train("npnet", pairs, tmp_path / "out", init_from=network)


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_noises_of_another_model_are_refused(name, tmp_path):
    facts = digits_facts()
    facts["models"][name]["probe"][0] += 1
    other = write_noises(tmp_path / "pairs", facts=facts)
    message = f"`dataset_dir` was made with, got .* whose {name} has other weights"
    with pytest.raises(ValueError, match=message):
        train("golden_noise_model", other, tmp_path / "out")


def test_broken_noise_names_its_sample(pairs, tmp_path, monkeypatch):
    def broken(seed, shape):
        return source_noise(seed, shape) * (float("nan") if seed == 4 else 1.0)

    monkeypatch.setattr("diffusers_ext.golden_noise.pairs.dataset.source_noise", broken)
    with pytest.raises(ValueError, match=rf"Sample 4 \('{PROMPTS[0]}'\) must be finite"):
        train("golden_noise_model", pairs, tmp_path / "out", validation_split=0)


def test_a_loss_that_is_not_finite_stops_the_run(pairs, tmp_path):
    run = {"learning_rate": 1e30, "logging_steps": 1, "max_grad_norm": 1e30}
    with pytest.raises(FloatingPointError, match="must stay finite"):
        train("golden_noise_model", pairs, tmp_path / "out", **run)
    assert not (tmp_path / "out" / WEIGHTS).exists()


def test_nothing_is_needed_but_text(pairs, tmp_path, monkeypatch):
    """Neither denoiser nor VAE is loaded."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    for model in (AutoencoderKL, UNet2DConditionModel):
        monkeypatch.setattr(model, "from_pretrained", None)
    train("golden_noise_model", pairs, tmp_path / "out", max_train_steps=1)


def test_the_loaded_network_refines(pairs, tmp_path):
    network = load_noise_model(train("npnet", pairs, tmp_path / "out"))
    assert isinstance(network, NPNet)
    noise = source_noise(0, SHAPE)[None]
    refined = network.refine(noise, torch.randn(1, 16, 128))
    assert refined.shape == noise.shape
    assert not torch.equal(refined, noise)
