from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork
from diffusers_ext.golden_noise.pipelines import GoldenNoisePipeline
from tests.golden_noise.golden_pipelines import (
    FAMILIES,
    NETWORKS,
    draw,
    golden_pipeline,
    network_sizes,
    random_network,
    with_network,
)

every_family = pytest.mark.parametrize("family", FAMILIES)


def load(pipeline_class: type, path: Path, **arguments):
    arguments.setdefault("dtype", torch.float32)
    pipeline = pipeline_class.from_pretrained(path, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same_pictures(found: torch.Tensor, expected: torch.Tensor) -> None:
    # Loaded weights lie elsewhere in memory, and kernels sum unaligned ones in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@every_family
def test_pipelines_are_saved_and_loaded_with_their_network(family, tmp_path):
    plain = FAMILIES[family].plain()
    pipeline = with_network(plain, family)
    picture = draw(pipeline, family)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["noise_model"] == ["diffusers_ext", "GoldenNoiseModel"]
    assert index["_class_name"] == FAMILIES[family].golden.__name__
    loaded = load(FAMILIES[family].golden, tmp_path)
    assert loaded.noise_model.config.width == 64
    assert_same_pictures(draw(loaded, family), picture)
    assert load(FAMILIES[family].golden, tmp_path, noise_model=None).noise_model is None
    stock = load(type(plain), tmp_path)
    assert type(stock) is type(plain)
    assert_same_pictures(draw(stock, family), draw(pipeline, family, golden_noise_scale=0))


@every_family
def test_a_plain_base_takes_a_network_when_it_is_loaded(family, tmp_path):
    plain = FAMILIES[family].plain()
    pipeline = with_network(plain, family)
    plain.save_pretrained(tmp_path)
    assert load(FAMILIES[family].golden, tmp_path).noise_model is None
    loaded = load(FAMILIES[family].golden, tmp_path, noise_model=pipeline.noise_model)
    assert loaded.noise_model is pipeline.noise_model
    assert_same_pictures(draw(loaded, family), draw(pipeline, family))


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_of_every_class_are_components(network, tmp_path):
    pipeline = golden_pipeline("sd", name=network)
    picture = draw(pipeline, "sd")
    pipeline.save_pretrained(tmp_path)
    loaded = load(GoldenNoisePipeline, tmp_path)
    assert type(loaded.noise_model) is type(pipeline.noise_model)
    assert_same_pictures(draw(loaded, "sd"), picture)
    other = golden_pipeline("sd", name="rnn" if network == "model" else "model").noise_model
    assert load(GoldenNoisePipeline, tmp_path, noise_model=other).noise_model is other
    plain = GoldenNoisePipeline.from_pipe(FAMILIES["sd"].plain())
    plain.load_noise_model(tmp_path, subfolder="noise_model")
    plain.set_progress_bar_config(disable=True)
    assert type(plain.noise_model) is type(pipeline.noise_model)
    assert not plain.noise_model.training
    assert_same_pictures(draw(plain, "sd"), picture)
    half = GoldenNoisePipeline.from_pipe(plain)
    half.load_noise_model(tmp_path / "noise_model", dtype=torch.float16)
    assert half.noise_model.dtype == torch.float16


@every_family
def test_pipelines_are_made_of_one_another(family):
    plain = FAMILIES[family].plain()
    picture = draw(plain, family)
    golden = FAMILIES[family].golden
    network = with_network(plain, family).noise_model
    pipeline = golden.from_pipe(plain, noise_model=network)
    assert pipeline.noise_model is network
    assert pipeline.vae is plain.vae
    again = golden.from_pipe(pipeline)
    assert again.noise_model is network
    back = type(plain).from_pipe(again)
    back.set_progress_bar_config(disable=True)
    assert type(back) is type(plain)
    assert "noise_model" not in back.components
    assert draw(back, family).equal(picture)


@pytest.mark.parametrize("network", NETWORKS)
def test_from_pipe_hands_over_networks_of_every_class(network, caplog):
    pipeline = golden_pipeline("sdxl", name=network)
    again = type(pipeline).from_pipe(pipeline)
    assert again.noise_model is pipeline.noise_model
    assert "not switched over" not in caplog.text


def test_a_network_set_later_is_saved_and_one_removed_is_not(tmp_path):
    pipeline = golden_pipeline("sd")
    assert pipeline.components["noise_model"] is pipeline.noise_model
    pipeline.save_pretrained(tmp_path / "with")
    assert (tmp_path / "with" / "noise_model" / "config.json").is_file()
    pipeline.set_noise_model(None)
    pipeline.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / "noise_model").exists()
    assert load(GoldenNoisePipeline, tmp_path / "without").noise_model is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_copies_load(dtype, tmp_path):
    golden_pipeline("sd").save_pretrained(tmp_path)
    loaded = load(GoldenNoisePipeline, tmp_path, dtype=dtype)
    assert loaded.unet.dtype == loaded.noise_model.dtype == dtype


def test_the_text_alone_is_encoded_without_a_denoiser(tmp_path):
    pipeline = golden_pipeline("sd")
    expected = pipeline.encode_prompt("a red seven", "cpu", 1, False)[0]
    pipeline.save_pretrained(tmp_path)
    loaded = load(GoldenNoisePipeline, tmp_path, unet=None, vae=None)
    assert loaded.encode_prompt("a red seven", "cpu", 1, False)[0].equal(expected)


@pytest.mark.parametrize("wrong", ["user/network", torch.nn.Linear(2, 2)])
def test_what_is_no_network_is_refused(wrong):
    plain = FAMILIES["sd"].plain()
    pipeline = GoldenNoisePipeline.from_pipe(plain)
    message = f"must be a golden-noise network, got a {type(wrong).__name__}. Use `load_noise_mod"
    for use in (
        lambda: pipeline.set_noise_model(wrong),
        lambda: GoldenNoisePipeline.from_pipe(plain, noise_model=wrong),
    ):
        with pytest.raises(TypeError, match=message):
            use()
    assert pipeline.noise_model is None


@every_family
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_for_other_latents_or_text_are_refused_with_both_sizes(family, network, tmp_path):
    pipeline = golden_pipeline(family)
    before = pipeline.noise_model
    name = type(pipeline).__name__
    sizes = network_sizes(pipeline)
    other = 4 if sizes.in_channels == 16 else 16
    for wrong, has in (({"in_channels": other}, sizes.in_channels), ({"text_embed_dim": 10}, None)):
        ((field, value),) = wrong.items()
        unfit = random_network(pipeline, network, **wrong)
        has = sizes.text_embed_dim if has is None else has
        message = f"`noise_model` must have `{field}` {has} like the {name}, got {value}"
        with pytest.raises(ValueError, match=message):
            pipeline.set_noise_model(unfit)
        with pytest.raises(ValueError, match=message):
            type(pipeline).from_pipe(pipeline, noise_model=unfit)
    unfit.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        pipeline.load_noise_model(tmp_path)
    assert pipeline.noise_model is before


@every_family
def test_networks_of_pooled_text_are_measured_by_it(family):
    pipeline = golden_pipeline(family)
    pooled = network_sizes(pipeline).pooled_dim
    if pooled is None:
        with pytest.raises(ValueError, match="must read tokens in a pipeline whose text encoder"):
            pipeline.set_noise_model(random_network(pipeline, "rnn", pooled_text=True))
        return
    network = random_network(pipeline, "rnn", text_embed_dim=pooled, pooled_text=True)
    pipeline.set_noise_model(network)
    assert not draw(pipeline, family).equal(draw(pipeline, family, golden_noise_scale=0))
    with pytest.raises(ValueError, match=f"`text_embed_dim` {pooled} like the .*, got 10"):
        pipeline.set_noise_model(random_network(pipeline, "rnn", text_embed_dim=10, pooled_text=True))


class Reversal(ModelMixin, ConfigMixin, GoldenNoiseNetwork):
    """A user's network without sizes."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def golden_noise(self, noise, prompt_embeds, *, attention_mask=None, pooled_prompt_embeds=None):
        return -self.weight * noise


def test_a_network_of_ones_own_needs_no_sizes():
    pipeline = GoldenNoisePipeline.from_pipe(FAMILIES["sd"].plain(), noise_model=Reversal())
    pipeline.set_progress_bar_config(disable=True)
    assert not draw(pipeline, "sd").equal(draw(pipeline, "sd", golden_noise_scale=0))


def test_a_folder_without_a_network_is_refused(tmp_path):
    pipeline = golden_pipeline("sd")
    pipeline.unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a golden-noise network, one of .*NPNet"):
        pipeline.load_noise_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("network", NETWORKS)
def test_folders_in_half_precision_draw_as_they_load_and_in_half_precision(network, dtype, tmp_path):
    pipeline = golden_pipeline("sd", name=network)
    stored = type(pipeline).from_pipe(pipeline, dtype=dtype)
    stored.save_pretrained(tmp_path)
    # transformers keeps a stored dtype and diffusers does not, so a folder that is to load without
    # `dtype` says so, as the bundled models do.
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}))
    loaded = GoldenNoisePipeline.from_pretrained(tmp_path)  # without `dtype`
    loaded.set_progress_bar_config(disable=True)
    picture = draw(loaded, "sd")
    assert picture.isfinite().all()
    of_network = loaded.noise_model.from_pretrained(tmp_path / "noise_model")
    loaded.set_noise_model(of_network)
    assert torch.equal(draw(loaded, "sd"), picture)
    half = load(GoldenNoisePipeline, tmp_path, dtype=dtype)
    assert half.noise_model.dtype == dtype
    assert draw(half, "sd").isfinite().all()
