"""Noise that spreads a prompt's pictures: the prediction is the pipeline's own, and it moves apart."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext.families import find_family
from diffusers_ext.families.predictions import predicted_x_0
from diffusers_ext.golden_noise import diversity
from diffusers_ext.golden_noise.diverse_targets import differentiable_prediction, spread_noise
from diffusers_ext.golden_noise.noise_statistics import match_spectrum
from diffusers_ext.golden_noise.redenoise import TOOL, encode_prompts
from tests.golden_noise.golden_pipelines import FAMILIES, PROMPTS, draw
from tests.tiny_digits import random_digits_pipeline


@pytest.mark.parametrize("name", ["sd", "flux", "z_image"])
def test_the_first_prediction_is_the_one_of_the_pipelines_call(name, monkeypatch):
    golden = FAMILIES[name].golden.from_pipe(FAMILIES[name].plain())
    golden.set_progress_bar_config(disable=True)
    family, seen = find_family(golden, TOOL), []
    plain = diversity.spread_output

    def recorded(output, x_t, mean, level, kind, spread):
        seen.append(predicted_x_0(output, x_t, level, kind))
        return plain(output, x_t, mean, level, kind, spread)

    monkeypatch.setattr(diversity, "spread_output", recorded)
    sizes = family.network_sizes(getattr(golden, family.denoiser).config)
    side = FAMILIES[name].pixels // family.pixels_per_latent(golden)
    noise = torch.randn(1, sizes.in_channels, side, side, generator=torch.Generator().manual_seed(3))
    guidance = next(iter(family.guidance_arguments(getattr(golden, family.denoiser).config, 1.0)))
    none = 1.0 - getattr(family, "guidance_offset", 0.0)
    draw(golden, name, latents=family.pack(golden, noise), diversity=0.5, num_inference_steps=3, **{guidance: none})
    text = encode_prompts(golden, PROMPTS[:1])
    scheduler = dict(vars(golden.scheduler))
    predict = differentiable_prediction(golden, text, num_steps=3, guidance_scale=none)
    found = family.pack(golden, predict(noise)).view_as(seen[0])
    torch.testing.assert_close(found, seen[0], atol=2e-3, rtol=1e-3)
    assert all(value is scheduler[name] for name, value in vars(golden.scheduler).items())


def test_predictions_move_apart_and_noise_stays_white():
    pipeline = random_digits_pipeline()
    text = encode_prompts(pipeline, [PROMPTS[0]])[[0] * 4]
    predict = differentiable_prediction(pipeline, text, num_steps=2, guidance_scale=1.0)
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = spread_noise(noise, predict, gain=2.0, steps=4, rate=0.1)
    with torch.no_grad():
        before, after = (torch.pdist(predict(x).flatten(1)).mean() for x in (noise, moved))
    assert after > 1.03 * before
    torch.testing.assert_close(match_spectrum(moved, noise), moved)
    alone = spread_noise(noise[:1], differentiable_prediction(pipeline, text[[0]], num_steps=2, guidance_scale=1.0),
                         gain=2.0, steps=4, rate=0.1)  # fmt: skip
    torch.testing.assert_close(moved[:1], alone, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="`gain` must be positive, got -1"):
        spread_noise(noise, predict, gain=-1, steps=1, rate=0.1)


def test_a_scheduler_of_unknown_levels_is_refused():
    pipeline = random_digits_pipeline()
    text = encode_prompts(pipeline, [PROMPTS[0]])
    del pipeline.scheduler.alphas_cumprod
    with pytest.raises(ValueError, match="`target` must not be 'diversity' with a scheduler whose levels"):
        differentiable_prediction(pipeline, text, num_steps=2, guidance_scale=1.0)
