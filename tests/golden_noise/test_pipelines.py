from __future__ import annotations

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from diffusers_ext.families import find_family
from diffusers_ext.golden_noise.pipelines import _GoldenCall
from diffusers_ext.golden_noise.redenoise import encode_prompts
from tests.golden_noise.golden_pipelines import (
    FAMILIES,
    NETWORKS,
    PROMPTS,
    draw,
    golden_pipeline,
    random_network,
    record_refining,
    seeded,
    with_network,
)

every_family = pytest.mark.parametrize("family", FAMILIES)


def as_given(pipeline, golden: torch.Tensor) -> torch.Tensor:
    """Noise as the family's `latents` argument takes it."""
    return find_family(pipeline).pack(pipeline, golden)


@every_family
def test_without_a_network_or_at_scale_zero_it_is_the_plain_pipeline(family):
    plain = FAMILIES[family].plain()
    expected = draw(plain, family)
    pipeline = FAMILIES[family].golden.from_pipe(plain)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.noise_model is None
    assert isinstance(pipeline, type(plain))
    assert draw(pipeline, family).equal(expected)
    pipeline.set_noise_model(random_network(pipeline))
    assert draw(pipeline, family, golden_noise_scale=0).equal(expected)
    assert not draw(pipeline, family).allclose(expected, atol=2e-3)


@every_family
def test_the_network_reads_the_text_it_is_trained_with(family):
    plain = FAMILIES[family].plain()
    pipeline = with_network(plain, family)
    calls = record_refining(pipeline)
    text = encode_prompts(plain, PROMPTS)
    picture = draw(pipeline, family, prompt=PROMPTS, generator=seeded(0, 1), golden_noise_scale=0.7)
    (call,) = calls
    for name in ("prompt_embeds", "attention_mask", "pooled_prompt_embeds"):
        given, expected = call.get(name), getattr(text, name)
        if expected is None or name not in find_family(pipeline).text_outputs:
            assert given is None, name
        else:
            assert given.equal(expected), name
    assert call["scale"] == 0.7
    assert call["noise"].dtype == torch.float32
    noise = [torch.randn(call["noise"].shape[1:], generator=one) for one in seeded(0, 1)]
    assert call["noise"].equal(torch.stack(noise))
    latents = as_given(pipeline, call["golden"])
    assert draw(plain, family, prompt=PROMPTS, latents=latents).equal(picture)


@every_family
def test_a_noise_does_not_depend_on_its_batch(family):
    pipeline = golden_pipeline(family)
    calls = record_refining(pipeline)
    draw(pipeline, family, prompt=PROMPTS, generator=seeded(3, 4))
    for prompt, seed in zip(PROMPTS, (3, 4)):
        draw(pipeline, family, prompt=prompt, generator=seeded(seed))
    together, first, second = calls
    alone = torch.cat([first["golden"], second["golden"]])
    torch.testing.assert_close(together["golden"], alone)
    assert together["noise"].equal(torch.cat([first["noise"], second["noise"]]))


@every_family
def test_several_images_of_a_prompt_each_read_it(family):
    pipeline = golden_pipeline(family)
    calls = record_refining(pipeline)
    draw(pipeline, family, prompt=PROMPTS, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3))
    repeated = [prompt for prompt in PROMPTS for _ in range(2)]
    draw(pipeline, family, prompt=repeated, generator=seeded(0, 1, 2, 3))
    images, prompts = calls
    for name in (*find_family(pipeline).text_outputs, "noise", "golden"):
        torch.testing.assert_close(images[name], prompts[name])


@every_family
def test_embeddings_take_the_place_of_prompts(family):
    pipeline = golden_pipeline(family)
    text = encode_prompts(pipeline, PROMPTS, None)
    text = text.positive() if family == "qwen_image" else text  # which negative ones would guide
    given = find_family(pipeline).text_arguments(text)
    expected = draw(pipeline, family, prompt=PROMPTS, generator=seeded(0, 1))
    torch.testing.assert_close(draw(pipeline, family, **given, generator=seeded(0, 1)), expected)


@pytest.mark.parametrize("masks", [1, 2])
def test_given_masks_are_repeated_with_their_images_if_they_are_not_yet(masks):
    pipeline = golden_pipeline("hunyuan_dit")
    calls = record_refining(pipeline)
    text = encode_prompts(pipeline, PROMPTS[:1])
    pipeline._golden_call = _GoldenCall(1.0)  # as during a call
    pipeline.encode_prompt(
        prompt=None,
        num_images_per_prompt=2,
        do_classifier_free_guidance=False,
        prompt_embeds=text.prompt_embeds,
        prompt_attention_mask=text.attention_mask.repeat(masks, 1),
    )
    pipeline.prepare_latents(2, 4, 64, 64, torch.float32, torch.device("cpu"), None)
    (call,) = calls
    assert call["attention_mask"].equal(text.attention_mask.repeat(2, 1))


@every_family
@pytest.mark.parametrize(
    "guidance", [{"guidance_scale": 1.0}, {"negative_prompt": "a green two", "guidance_scale": 4.0}]
)
def test_the_network_reads_the_positive_prompt_whatever_the_guidance(family, guidance):
    if family in ("flux", "qwen_image"):
        guidance = {**guidance, "true_cfg_scale": guidance["guidance_scale"]}
    if family == "qwen_image":
        del guidance["guidance_scale"]
    guidance = dict(guidance)
    if family == "flux2_dev":  # is told the scale, and has no negative prompt
        guidance.pop("negative_prompt", None)
    if family == "flux2" and guidance.pop("negative_prompt", None):
        negative = encode_prompts(FAMILIES[family].plain(), ["a green two"]).prompt_embeds
        guidance["negative_prompt_embeds"] = negative
    pipeline = golden_pipeline(family)
    calls = record_refining(pipeline)
    draw(pipeline, family)
    draw(pipeline, family, **guidance)
    default, guided = calls
    for name in default:
        assert name in ("scale", "predict") or guided[name].equal(default[name]), name


@every_family
def test_given_latents_are_refined_as_well_and_any_size_works(family):
    pipeline = golden_pipeline(family)
    calls = record_refining(pipeline)
    height, width = FAMILIES[family].other_size
    size = {"height": height, "width": width}
    picture = draw(pipeline, family, **size)
    assert picture.shape[-2:] == (height, width)
    noise = calls[0]["noise"]
    side = find_family(pipeline).pixels_per_latent(pipeline)
    assert noise.shape[-2:] == (height // side, width // side)
    latents = as_given(pipeline, noise)
    assert draw(pipeline, family, latents=latents, **size).equal(picture)
    assert calls[1]["noise"].equal(noise)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_network_gets_unit_noise_and_the_sampler_its_own_scale(family):
    plain = FAMILIES[family].plain()
    plain.scheduler = EulerDiscreteScheduler.from_config(plain.scheduler.config, timestep_spacing="leading")
    pipeline = with_network(plain, family)
    calls = record_refining(pipeline)
    picture = draw(pipeline, family)
    assert plain.scheduler.init_noise_sigma > 1.5
    (call,) = calls
    noise = torch.randn(call["noise"].shape, generator=seeded(0)[0])
    torch.testing.assert_close(call["noise"], noise)
    torch.testing.assert_close(draw(plain, family, latents=call["golden"]), picture)


@every_family
def test_refined_noise_comes_back_in_the_dtype_of_the_pipeline(family):
    pipeline = golden_pipeline(family).to(torch.bfloat16)
    pipeline.noise_model.to(torch.float32)
    calls = record_refining(pipeline)
    latents = []

    def look(_, step, timestep, tensors):
        latents.append(tensors["latents"])
        return {}

    draw(pipeline, family, callback_on_step_end=look)
    assert latents[0].dtype == (find_family(pipeline).latents_dtype or torch.bfloat16)
    assert calls[0]["noise"].dtype == calls[0]["golden"].dtype == torch.float32


@every_family
def test_every_network_works_in_every_family(family, subtests):
    pipeline = golden_pipeline(family)
    plain = draw(pipeline, family, golden_noise_scale=0)
    for name in NETWORKS:
        with subtests.test(network=name):
            if name == "npnet" and not find_family(pipeline).pads_text:
                with pytest.raises(ValueError, match="must be none of NPNet for .*as long as their prompts"):
                    pipeline.set_noise_model(random_network(pipeline, name))
                continue
            pipeline.set_noise_model(random_network(pipeline, name))
            calls = record_refining(pipeline)
            assert not draw(pipeline, family).equal(plain)
            (call,) = calls
            energies = [call[noise].square().mean() for noise in ("noise", "golden")]
            torch.testing.assert_close(*energies)
