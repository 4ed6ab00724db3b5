from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FluxPipeline,
    HunyuanDiTPipeline,
    QwenImagePipeline,
)
from peft import LoraConfig

from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.evaluation.rendering import (
    Sampling,
    adapter_layers,
    adapters_disabled,
    draw,
    draw_from_noise,
    eval_mode,
    image_seed,
    latent_shape,
    paired_drawing,
    render_clips,
    shots_of,
    to_images,
    unit_noise,
    without_noise_model,
)
from diffusers_ext.families import find_family
from diffusers_ext.golden_noise.pipelines import GoldenNoisePipeline
from tests.evaluation.conftest import add_lora, make_pipeline
from tests.golden_noise.golden_pipelines import FAMILIES, golden_pipeline
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.tiny_current_pipelines import tiny_qwen_image_pipeline, tiny_z_image_pipeline
from tests.tiny_image_pipelines import tiny_flux_pipeline, tiny_hunyuan_dit_pipeline, tiny_sd3_pipeline
from tests.tiny_pipelines import sdxl_pipeline

SAMPLING = Sampling(num_inference_steps=2, guidance_scale=3.0)
SHOTS = shots_of(["a red seven", "a blue one"], 2, seed=0)


def test_a_seed_depends_on_prompt_number_and_stream_alone():
    assert image_seed(0, "a red seven", 1) == SHOTS[1].seed
    seeds = {
        image_seed(seed, prompt, index, stream)
        for seed in (0, 1)
        for prompt in ("a red seven", "a blue one")
        for index in range(3)
        for stream in ("paired", "floor")
    }
    assert len(seeds) == 24
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert shots_of(["a blue one"], 2, seed=0) == SHOTS[2:]


def test_pictures_do_not_depend_on_the_batch(pipeline):
    together = draw(pipeline, SHOTS, SAMPLING)
    alone = torch.cat([draw(pipeline, [shot], SAMPLING) for shot in reversed(SHOTS)]).flip(0)
    assert together.shape == (4, 3, 32, 32)
    assert together.dtype == torch.float32
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together[0] - together[1]).abs().mean() > 1e-3


def test_the_settings_reach_the_pipeline(pipeline):
    plain = draw(pipeline, SHOTS[:1], SAMPLING)
    sampling = Sampling(2, 3.0, negative_prompt="a blue one", height=16, width=24)
    assert draw(pipeline, SHOTS[:1], sampling).shape == (1, 3, 16, 24)
    assert not torch.equal(draw(pipeline, SHOTS[:1], Sampling(3, 3.0)), plain)
    assert not torch.equal(draw(pipeline, SHOTS[:1], Sampling(2, 6.0)), plain)
    negative = draw(pipeline, SHOTS[:1], Sampling(2, 3.0, negative_prompt="a blue one"))
    assert not torch.equal(negative, plain)


def test_pictures_that_are_not_finite_are_refused(pipeline):
    pipeline.unet.conv_out.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="must draw finite pictures, got NaN .* for 'a red seven'"):
        draw(pipeline, SHOTS, SAMPLING)


def test_to_images_rounds_to_bytes():
    pixels = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 4)
    (image,) = to_images(pixels)
    assert image.size == (4, 2)
    assert np.asarray(image)[1, 3].tolist() == [0, 128, 255]


def test_one_pipeline_gives_both_sides(pipeline, tuned):
    base, with_lora = draw(pipeline, SHOTS, SAMPLING), draw(tuned, SHOTS, SAMPLING)
    assert (base - with_lora).abs().mean() > 1e-3
    with paired_drawing(tuned, None, SAMPLING) as (draw_base, draw_tuned):
        assert torch.equal(draw_base(SHOTS), base)
        assert torch.equal(draw_tuned(SHOTS), with_lora)
        assert torch.equal(draw_base(SHOTS), base)
    with paired_drawing(pipeline, tuned, SAMPLING) as (draw_base, draw_tuned):
        assert torch.equal(draw_base(SHOTS), base)
        assert torch.equal(draw_tuned(SHOTS), with_lora)


def test_adapters_of_the_text_encoder_are_switched_off_too(pipeline, tuned):
    torch.manual_seed(2)
    config = LoraConfig(r=2, lora_alpha=40, target_modules=["q_proj"], init_lora_weights=False)
    tuned.text_encoder.add_adapter(config, adapter_name="words")
    assert len(adapter_layers(tuned)) == 8 + 2
    with paired_drawing(tuned, None, SAMPLING) as (draw_base, _):
        assert torch.equal(draw_base(SHOTS), draw(pipeline, SHOTS, SAMPLING))


def state_of(pipeline) -> list:
    layers = [(layer.disable_adapters, layer.active_adapter, layer.training) for layer in adapter_layers(pipeline)]
    models = [pipeline.unet, pipeline.text_encoder, pipeline.vae]
    return [
        layers,
        [p.requires_grad for model in models for p in model.parameters()],
        [module.training for model in models for module in model.modules()],
        id(pipeline.scheduler),
        pipeline._progress_bar_config,
    ]


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_pipeline_is_left_as_it_was(tuned, picture, interrupted):
    tuned.unet.mid_block.train()
    tuned.unet.enable_adapters()
    frozen = next(p for n, p in tuned.unet.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    before, drawn = state_of(tuned), picture()
    assert any(before[1])
    weights = {name: tensor.clone() for name, tensor in tuned.unet.state_dict().items()}
    try:
        with paired_drawing(tuned, None, SAMPLING) as (draw_base, draw_tuned):
            assert not any(m.training for m in tuned.unet.modules())
            draw_base(SHOTS)
            draw_tuned(SHOTS)
            if interrupted:
                with adapters_disabled(tuned):
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert state_of(tuned) == before
    assert all(torch.equal(weights[name], t) for name, t in tuned.unet.state_dict().items())
    assert torch.equal(picture(), drawn)


def test_an_adapter_that_was_off_stays_off(tuned):
    first = adapter_layers(tuned)[0]
    first.enable_adapters(False)
    with adapters_disabled(tuned):
        assert not adapter_layers(tuned)
    assert first.disable_adapters
    assert len(adapter_layers(tuned)) == 7


def test_eval_mode_keeps_modules_that_were_in_training(pipeline):
    pipeline.unet.conv_in.train()
    with pytest.raises(KeyError), eval_mode(pipeline):
        raise KeyError(pipeline.unet.conv_in.training)
    with eval_mode(pipeline):
        assert not pipeline.unet.conv_in.training
    assert pipeline.unet.conv_in.training
    assert not pipeline.unet.conv_out.training


def refused(base, tuned, message: str) -> None:
    with pytest.raises(ValueError, match=message), paired_drawing(base, tuned, SAMPLING):
        pytest.fail("nothing was refused")


def test_a_pipeline_without_an_active_adapter_is_refused(pipeline, tuned):
    refused(pipeline, None, "`base` must carry an active adapter when `tuned` is None, got none")
    tuned.disable_lora()
    refused(tuned, None, "`base` must carry an active adapter")


def test_fused_adapters_are_refused(tuned):
    tuned.fuse_lora()
    refused(tuned, None, "must not have its adapters merged into its weights")


def test_pipelines_that_share_a_denoiser_are_refused(pipeline):
    refused(pipeline, pipeline, "`tuned` must have a denoiser of its own")


def test_pipelines_with_different_schedulers_are_refused(pipeline):
    other = make_pipeline(DDPMScheduler.from_config(pipeline.scheduler.config))
    refused(pipeline, other, "got DDPMScheduler for DDIMScheduler")
    changed = DDIMScheduler.from_config(pipeline.scheduler.config, beta_end=0.02)
    refused(pipeline, make_pipeline(changed), r"other \['beta_end'\]: the drift would be")


def test_two_tuned_pipelines_can_be_compared(tuned):
    other = add_lora(make_pipeline())
    with paired_drawing(tuned, other, SAMPLING) as (draw_base, draw_tuned):
        assert torch.equal(draw_base(SHOTS), draw_tuned(SHOTS))


TWO_SHOTS = shots_of(["a red seven", "a blue one"], 1, seed=3)
PIPELINES = [
    make_pipeline, sdxl_pipeline, tiny_hunyuan_dit_pipeline, tiny_sd3_pipeline, tiny_flux_pipeline,
    FAMILIES["flux2"].plain, tiny_qwen_image_pipeline, tiny_z_image_pipeline,
]  # fmt: skip


def plain_arguments(pipeline) -> dict:
    return {"use_resolution_binning": False} if isinstance(pipeline, HunyuanDiTPipeline) else {}


@pytest.mark.parametrize("make", PIPELINES)
def test_unit_noise_draws_what_the_plain_pipeline_draws_from_the_seed(make):
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    shape = latent_shape(pipeline, 64, 48)
    height, width = (size * find_family(pipeline).pixels_per_latent(pipeline) for size in shape[1:])
    assert (height, width) == (64, 48)
    noise = unit_noise(TWO_SHOTS, shape)
    assert noise.dtype == torch.float32
    sampling = Sampling(2, 3.0, None, height, width)
    expected = draw(pipeline, TWO_SHOTS, sampling, **plain_arguments(pipeline))
    found = draw_from_noise(pipeline, TWO_SHOTS, Sampling(2, 3.0), noise)
    assert torch.equal(found, expected)
    assert not torch.equal(draw_from_noise(pipeline, TWO_SHOTS, Sampling(2, 3.0), -noise), expected)


@pytest.mark.parametrize("make", PIPELINES)
def test_the_shape_without_a_size_is_the_pipelines_own(make):
    pipeline = make()
    shape = latent_shape(pipeline)
    size = {"flux2": 64, "z_image": 128}.get(find_family(pipeline).name, getattr(pipeline, "default_sample_size", 8))
    assert shape[1:] == (size, size)
    channels = denoiser_of(pipeline).config.in_channels
    assert shape[0] == (channels // 4 if isinstance(pipeline, (FluxPipeline, QwenImagePipeline)) else channels)


def test_a_call_without_a_negative_prompt_gets_it_encoded():
    pipeline = FAMILIES["flux2"].plain()
    noise = unit_noise(TWO_SHOTS, latent_shape(pipeline, 32, 32))
    drawn = [
        draw_from_noise(pipeline, TWO_SHOTS, Sampling(2, 3.0, negative), noise) for negative in (None, "", "a red two")
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of this scheduler, with numpy 2
def test_a_sampler_that_adds_noise_draws_as_from_its_seed():
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    pipeline = make_pipeline()
    pipeline.scheduler = EulerAncestralDiscreteScheduler(**config)
    expected = draw(pipeline, TWO_SHOTS, Sampling(3, 3.0))
    noise = unit_noise(TWO_SHOTS, latent_shape(pipeline))
    found = draw_from_noise(pipeline, TWO_SHOTS, Sampling(3, 3.0), noise)
    assert torch.equal(found, expected)


def test_each_noise_depends_on_its_seed_alone():
    noise = unit_noise(TWO_SHOTS, (4, 8, 8))
    assert torch.equal(unit_noise(TWO_SHOTS[1:], (4, 8, 8)), noise[1:])
    generator = torch.Generator().manual_seed(TWO_SHOTS[0].seed)
    assert torch.equal(noise[0], torch.randn(4, 8, 8, generator=generator))


def test_a_golden_pipeline_is_plain_for_a_while():
    pipeline = golden_pipeline("sd")
    network, config = pipeline.noise_model, dict(pipeline.config)
    assert isinstance(pipeline, GoldenNoisePipeline)

    def stop() -> None:
        with without_noise_model(pipeline):
            assert pipeline.noise_model is None
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert pipeline.noise_model is network
    assert dict(pipeline.config) == config
    plain = make_pipeline()
    with without_noise_model(plain):
        assert not hasattr(plain, "noise_model")


@pytest.mark.parametrize("make", [tiny_hunyuan_dit_pipeline, tiny_flux_pipeline])
def test_half_a_token_is_cut_off_as_the_pipeline_does(make):
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    shape = latent_shape(pipeline, 9 * pipeline.vae_scale_factor, 8 * pipeline.vae_scale_factor)
    assert shape[1:] == (8, 8)
    pixels = draw_from_noise(pipeline, TWO_SHOTS, Sampling(2, 3.0), unit_noise(TWO_SHOTS, shape))
    assert pixels.shape[-2:] == (8 * pipeline.vae_scale_factor,) * 2


CALL = {"num_frames": 9, "height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 2.0}
PROMPTS = ["a red seven", "a blue two", "the red one"]


def test_a_clip_depends_on_its_prompt_and_seed_alone(capsys):
    pipeline = tiny_video_pipeline()
    pipeline.transformer.train()
    scheduler = pipeline.scheduler
    clips = render_clips(pipeline, PROMPTS, seeds=[3, 4, 5], batch_size=2, **CALL)
    assert (clips.shape, clips.dtype) == ((3, 9, 16, 16, 3), np.uint8)
    assert "draw: 100%" in capsys.readouterr().err
    alone = render_clips(pipeline, PROMPTS[2:], seeds=[5], show_progress=False, **CALL)
    assert np.abs(alone[0].astype(int) - clips[2]).max() <= 1
    other = render_clips(pipeline, PROMPTS[2:], seeds=[6], show_progress=False, **CALL)
    assert np.abs(other[0].astype(int) - clips[2]).max() > 5
    assert capsys.readouterr().err == ""
    assert pipeline.transformer.training
    assert pipeline.scheduler is scheduler


def test_the_text_has_the_length_that_the_transformer_was_made_for():
    pipeline = tiny_video_pipeline()
    seen = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    for given in ({}, {"max_sequence_length": 7}):
        render_clips(pipeline, PROMPTS[:1], seeds=[0], show_progress=False, **CALL, **given)
    assert seen == [pipeline.transformer.config.max_text_seq_length, 7]


def test_clips_without_seeds_and_broken_ones_are_refused():
    pipeline = tiny_video_pipeline()
    for prompts, seeds in (([], []), (PROMPTS, [1])):
        with pytest.raises(ValueError, match="`seeds` must have one entry per prompt"):
            render_clips(pipeline, prompts, seeds=seeds, **CALL)
    pipeline.transformer.proj_out.bias.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="must draw finite clips, got NaN .* 'a red seven'"):
        render_clips(pipeline, PROMPTS, seeds=[1, 2, 3], show_progress=False, **CALL)
