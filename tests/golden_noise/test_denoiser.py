from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import PixArtAlphaPipeline, UNet2DConditionModel

from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.families import find_family
from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.redenoise import encode_prompts, guided_prediction, step_coefficients
from tests.golden_noise.golden_pipelines import FAMILIES, draw
from tests.golden_noise.redenoise_cases import BUILDERS, PROMPTS, pipeline_first_step, unit_noise
from tests.tiny_pipelines import pixart_pipeline


@pytest.mark.parametrize("scale", [1.0, 5.5])
@pytest.mark.parametrize("family", BUILDERS)
@torch.no_grad()
def test_prediction_is_the_pipelines_own(family, scale):
    pipeline = BUILDERS[family]()
    # Not square, so that a height taken for a width shows.
    noise = unit_noise(pipeline, size=(8, 12))
    expected = pipeline_first_step(pipeline, noise, scale)
    text = encode_prompts(pipeline, PROMPTS)
    found = guided_prediction(pipeline, expected.latents, expected.timestep, text, scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.prediction, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd", "sdxl", "hunyuan_dit", "sd3", "flux_schnell"])
@torch.no_grad()
def test_negative_prompts_are_the_pipelines_own(family):
    pipeline = BUILDERS[family]()
    noise = unit_noise(pipeline)
    expected = pipeline_first_step(pipeline, noise, 4.0, negative_prompt="green")
    text = encode_prompts(pipeline, PROMPTS, negative_prompt="green")
    found = guided_prediction(pipeline, noise, expected.timestep, text, 4.0)
    torch.testing.assert_close(found, expected.prediction, rtol=1e-4, atol=1e-5)
    plain = guided_prediction(pipeline, noise, expected.timestep, encode_prompts(pipeline, PROMPTS), 4.0)
    assert (found - plain).abs().max() > 1e-4


@pytest.mark.parametrize(("scale", "batches"), [(5.5, [4]), (0.0, [4]), (1.0, [2])])
def test_guidance_is_one_call(scale, batches):
    pipeline = BUILDERS["sd"]()
    text = encode_prompts(pipeline, PROMPTS)
    seen = []
    with torch.no_grad():
        hook = pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        guided_prediction(pipeline, unit_noise(pipeline), 901, text, scale)
        hook.remove()
    assert seen == batches


@pytest.mark.parametrize("family", ["flux2", "flux2_dev", "qwen_image", "z_image"])
@torch.no_grad()
def test_text_of_different_lengths_guides_in_one_call(family):
    """Each side is as in a call of its own, and the levels are those of the pipeline's call."""
    pipeline = FAMILIES[family].plain()
    draw(pipeline, family, num_inference_steps=4)
    levels, timestep = pipeline.scheduler.sigmas[:2].double(), pipeline.scheduler.timesteps[0]
    found = step_coefficients(pipeline, (8, 8), num_steps=4)
    assert found.timestep == timestep
    assert found.down_first == pytest.approx((levels[1] - levels[0]).item())
    text = encode_prompts(pipeline, ["a red seven", "a photo of a blue two and a green one"])
    noise = torch.randn(2, find_family(pipeline).latent_channels(pipeline.transformer.config), 8, 8)
    guided = guided_prediction(pipeline, noise, timestep, text, 3.0)
    if family == "flux2_dev":
        assert not torch.allclose(guided, guided_prediction(pipeline, noise, timestep, text, 1.0), atol=1e-4)
        return
    sides = text.tensors()
    negative = {name.removeprefix("negative_"): x for name, x in sides.items() if name.startswith("negative_")}
    conditional, unconditional = (
        torch.cat([guided_prediction(pipeline, noise[[row]], timestep, side[[row]], 1.0) for row in range(2)])
        for side in (text, TextConditioning(**negative))
    )
    expected = unconditional + 3.0 * (conditional - unconditional)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_embedded_guidance_is_one_call_without_a_negative_half():
    pipeline = BUILDERS["flux_dev"]()
    text = encode_prompts(pipeline, PROMPTS)
    seen = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((len(kwargs["hidden_states"]), kwargs["guidance"])), with_kwargs=True
    )
    guided_prediction(pipeline, unit_noise(pipeline), 1000, text, 3.5)
    hook.remove()
    assert len(seen) == 1
    assert seen[0][0] == 2
    assert torch.equal(seen[0][1], torch.tensor([3.5, 3.5]))


@torch.no_grad()
def test_a_unet_that_was_distilled_with_guidance_gets_the_scale():
    pipeline = BUILDERS["sd"]()
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(pipeline.unet.config, time_cond_proj_dim=8).eval()
    pipeline.register_modules(unet=unet)
    assert find_family(pipeline).embedded_guidance(unet.config)
    noise = unit_noise(pipeline)
    expected = pipeline_first_step(pipeline, noise, 5.5)
    text = encode_prompts(pipeline, PROMPTS)
    assert text.negative_prompt_embeds is None
    found = guided_prediction(pipeline, noise, expected.timestep, text, 5.5)
    torch.testing.assert_close(found, expected.prediction, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="`negative_prompt` must be None .* got 'green'"):
        encode_prompts(pipeline, PROMPTS, "green")


@pytest.mark.parametrize("family", BUILDERS)
@torch.no_grad()
def test_half_precision_models_give_float32(family):
    pipeline = BUILDERS[family]()
    text, noise = encode_prompts(pipeline, PROMPTS), unit_noise(pipeline)
    full = guided_prediction(pipeline, noise, 901.0, text, 2.0)
    denoiser_of(pipeline).to(torch.bfloat16)
    half = guided_prediction(pipeline, noise, 901.0, text, 2.0)
    assert half.dtype == torch.float32
    assert 0 < (half - full).norm() / full.norm() < 0.1


@pytest.mark.parametrize(
    ("family", "name", "channels"),
    [("sd", "sd", 4), ("hunyuan_dit", "hunyuan_dit", 4), ("sd3", "sd3", 16), ("flux_dev", "flux", 16)],
)  # fmt: skip
def test_families_are_told_by_their_pipelines(family, name, channels):
    pipeline = BUILDERS[family]()
    assert find_family(pipeline).name == name
    assert find_family(pipeline).latent_channels(denoiser_of(pipeline).config) == channels


def test_other_pipelines_are_refused():
    pipeline = pixart_pipeline()
    assert isinstance(pipeline, PixArtAlphaPipeline)
    with pytest.raises(ValueError, match=r"`pipeline` must be one of Stable.*, got a PixArtAlpha"):
        guided_prediction(pipeline, torch.randn(1, 4, 8, 8), 1, TextConditioning(torch.randn(1, 7, 12)), 1.0)


@pytest.mark.parametrize(
    ("family", "latents", "message"),
    [
        ("sd", torch.zeros(2, 16, 8, 8), r"\(batch, 4, height, width\) .* \(2, 16, 8, 8\)"),
        ("sd", torch.zeros(4, 8, 8), r"`latents` must be floating-point \(batch, 4"),
        ("sd", torch.zeros(2, 4, 8, 8).long(), r"`latents` must be floating-point .* torch.int64"),
        ("flux_dev", torch.zeros(2, 16, 64), r"\(batch, 16, height, width\) .* \(2, 16, 64\)"),
        ("flux_dev", torch.zeros(2, 16, 7, 8), r"divisible by 2, got \(2, 16, 7, 8\)"),
        ("sd3", torch.zeros(2, 16, 8, 9), r"divisible by 2, got \(2, 16, 8, 9\)"),
        ("sd", torch.zeros(3, 4, 8, 8), r"`prompt_embeds` must be a batch of 3 like `latents`"),
    ],
)
def test_latents_that_do_not_fit_are_refused(family, latents, message):
    pipeline = BUILDERS[family]()
    with pytest.raises(ValueError, match=message):
        guided_prediction(pipeline, latents, 1, encode_prompts(pipeline, PROMPTS), 1.0)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("sd", {"negative_prompt_embeds": None}, "`negative_prompt_embeds` must be given to a St"),
        ("sdxl", {"negative_pooled_prompt_embeds": None}, "`negative_pooled_prompt_embeds` must"),
        (
            "sdxl",
            {"pooled_prompt_embeds": None, "negative_pooled_prompt_embeds": None},
            "`pooled_prompt_embeds` must be given to a StableDiffusionXLPipeline",
        ),
        (
            "hunyuan_dit",
            {"attention_mask_2": None, "negative_attention_mask_2": None},
            "`attention_mask_2` must be given to a HunyuanDiTPipeline",
        ),
        (
            "flux_dev",
            {"negative_prompt_embeds": torch.zeros(2, 512, 12)},
            "`negative_prompt_embeds` must be None for a model that takes the guidance",
        ),
        ("flux_dev", {"pooled_prompt_embeds": torch.zeros(2, 5)}, r"must be \(2, 16\) .* \(2, 5\)"),
        ("flux_dev", {"prompt_embeds": torch.zeros(2, 9, 5)}, r"must be \(2, any, 12\) .*9, 5\)"),
    ],
)
def test_text_that_does_not_fit_is_refused(family, changes, message):
    pipeline = BUILDERS[family]()
    text = replace(encode_prompts(pipeline, PROMPTS), **changes)
    with pytest.raises(ValueError, match=message):
        guided_prediction(pipeline, unit_noise(pipeline), 1, text, 5.5)


@torch.no_grad()
def test_text_that_the_denoiser_does_not_read_is_let_pass():
    pipeline = BUILDERS["sd"]()
    text = encode_prompts(pipeline, PROMPTS)
    masked = replace(text, attention_mask=torch.ones(2, 16))
    noise = unit_noise(pipeline)
    found = [guided_prediction(pipeline, noise, 901, x, 5.5) for x in (text, masked)]
    assert torch.equal(*found)
