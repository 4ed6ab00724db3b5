"""What a model makes of noise at its first step, and guards that read it."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext.golden_noise.first_prediction import first_prediction
from diffusers_ext.golden_noise.networks.guard import NoiseGuard
from diffusers_ext.golden_noise.redenoise import encode_prompts
from tests.golden_noise.golden_pipelines import (
    FAMILIES,
    PROMPTS,
    draw,
    golden_pipeline,
    network_sizes,
    random_network,
    record_refining,
)
from tests.golden_noise.test_modular import call, modular_pipeline
from tests.tiny_digits import random_digits_pipeline

NEVER, ALWAYS = 1e9, -1e9  # thresholds


def guard_for(pipeline, **config) -> NoiseGuard:
    sizes = network_sizes(pipeline)
    torch.manual_seed(0)
    small = {"width": 16, "num_layers": 1, "num_heads": 2, "bands": 4}
    return NoiseGuard(sizes.in_channels, sizes.text_embed_dim, reads="prediction", **{**small, **config}).eval()


@torch.no_grad()
def test_it_is_the_picture_that_the_sampler_expects_at_its_first_step(subtests):
    pipeline = random_digits_pipeline()
    text, noise = encode_prompts(pipeline, PROMPTS), torch.randn(2, 4, 8, 8)
    for steps in (4, 10):
        with subtests.test(steps=steps):
            pipeline.scheduler.set_timesteps(steps)
            first = pipeline.scheduler.timesteps[0]
            output = pipeline.unet(noise, first, encoder_hidden_states=text.prompt_embeds).sample
            expected = pipeline.scheduler.step(output, first, noise).pred_original_sample
            torch.testing.assert_close(first_prediction(pipeline, text)(noise, steps), expected, atol=1e-4, rtol=1e-4)


def test_the_denoiser_is_left_as_it_was_also_after_an_error(monkeypatch):
    pipeline = random_digits_pipeline()
    text, noise = encode_prompts(pipeline, PROMPTS), torch.randn(2, 4, 8, 8)
    pipeline.unet.train()
    first_prediction(pipeline, text)(noise, 4)
    assert pipeline.unet.training

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.unet, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        first_prediction(pipeline, text)(noise, 4)
    assert all(part.training for part in pipeline.unet.modules())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "hunyuan_dit"])
def test_pipelines_hand_the_prediction_to_a_guard_that_reads_it(family):
    pipeline = golden_pipeline(family)
    golden, plain = draw(pipeline, family), draw(pipeline, family, golden_noise_scale=0)
    guard = guard_for(pipeline, threshold=NEVER)
    pipeline.noise_model.set_guard(guard)
    calls = record_refining(pipeline)
    assert torch.equal(draw(pipeline, family), plain)
    guard.register_to_config(threshold=ALWAYS)
    assert torch.equal(draw(pipeline, family), golden)
    noise = calls[0]["noise"]
    predicted = calls[0]["predict"](noise, 10)
    assert predicted.shape == noise.shape
    assert predicted.isfinite().all()


@pytest.mark.parametrize("family", ["sdxl", "flux", "qwen_image"])
def test_modular_pipelines_hand_it_over_as_well(family):
    plain = FAMILIES[family].plain()
    plain.set_progress_bar_config(disable=True)
    pipeline, network = modular_pipeline(plain, family), random_network(plain)
    pipeline.update_components(noise_model=network)
    golden, unrefined = call(pipeline, family), call(pipeline, family, golden_noise_scale=0)
    network.set_guard(guard_for(plain, threshold=NEVER))
    assert torch.equal(call(pipeline, family), unrefined)
    network.guard.register_to_config(threshold=ALWAYS)
    assert torch.equal(call(pipeline, family), golden)


def test_the_dial_of_diversity_neither_moves_the_prediction_nor_is_moved():
    pipeline = golden_pipeline("sd")
    spread = draw(pipeline, "sd", golden_noise_scale=0, diversity=1)
    pipeline.noise_model.set_guard(guard_for(pipeline, threshold=NEVER))
    made, inputs = [], NoiseGuard.inputs
    pipeline.noise_model.guard.inputs = lambda *given: (
        made.append(inputs(pipeline.noise_model.guard, *given)) or made[-1]
    )
    assert torch.equal(draw(pipeline, "sd", diversity=1), spread)
    draw(pipeline, "sd")
    assert torch.equal(*made)


def test_text_that_a_pipeline_does_not_hand_over_is_named():
    pipeline = golden_pipeline("hunyuan_dit")
    pipeline.noise_model.set_guard(guard_for(pipeline))
    with pytest.raises(ValueError, match="`prompt_embeds_2` must be given to the denoiser of Hunyuan-DiT, got None"):
        draw(pipeline, "hunyuan_dit")
    text, noise = encode_prompts(pipeline, PROMPTS), torch.randn(2, 4, 8, 8)
    assert first_prediction(pipeline, text)(noise, 4).shape == noise.shape


def test_a_guard_that_reads_it_does_not_do_without():
    pipeline = golden_pipeline("sd")
    network, noise = pipeline.noise_model, torch.randn(2, 4, 8, 8)
    network.set_guard(guard_for(pipeline))
    text = encode_prompts(pipeline, PROMPTS)
    with pytest.raises(ValueError, match="`predict` must be given to `refine` of a network whose guard reads"):
        network.refine(noise, text.prompt_embeds)
    for wrong, found in ((noise[:1], "1, 4, 8, 8"), (noise / 0, "with NaN")):
        with pytest.raises(ValueError, match=f"`predict` must give finite latents .*{found}"):
            network.refine(noise, text.prompt_embeds, predict=lambda *_, wrong=wrong: wrong)
    network.refine(noise, text.prompt_embeds, predict=first_prediction(pipeline, text))


@pytest.mark.parametrize("name", ["reads", "target"])
def test_guards_of_other_kinds_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` of a guard must be one of .*, got 'other'"):
        NoiseGuard(4, 8, **{name: "other"})
