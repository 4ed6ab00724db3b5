"""Families of today's models, on tiny real pipelines: text, latents and the denoiser's call are the pipeline's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_ext.families import find_family
from diffusers_ext.families.token_alignment import token_alignment
from diffusers_ext.nullspace.text_only import denoiser_arguments
from tests.tiny_current_pipelines import (
    tiny_auraflow_pipeline,
    tiny_flux2_pipeline,
    tiny_qwen_image_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)
from tests.tiny_image_pipelines import tiny_chroma_pipeline

PROMPTS = ["a red three", "a photo of the blue nine"]


class Setting(NamedTuple):
    """A tiny pipeline, the shape of its unpacked latents at 32 x 32 pixels, and what else its call needs."""

    build: Callable[[], DiffusionPipeline]
    latents: tuple[int, ...]
    patch: int
    call: Mapping[str, Any]
    padding: int = 0  # that the mask keeps


FAMILIES = {
    "flux2": Setting(tiny_flux2_pipeline, (16, 8, 8), 1, {}),
    "chroma": Setting(tiny_chroma_pipeline, (16, 8, 8), 2, {}, padding=1),
    "auraflow": Setting(tiny_auraflow_pipeline, (4, 8, 8), 2, {"guidance_scale": 1.0}),
    "qwen_image": Setting(tiny_qwen_image_pipeline, (4, 8, 8), 2, {}),
    "z_image": Setting(tiny_z_image_pipeline, (4, 8, 8), 2, {}),
    "wan": Setting(tiny_wan_pipeline, (4, 4, 4), 2, {"guidance_scale": 1.0}),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def called_with(pipeline: DiffusionPipeline, run: Callable[[], Any]) -> dict[str, Any]:
    """The arguments of the denoiser's first call in `run`, by name."""
    found: list[dict[str, Any]] = []
    signature = inspect.signature(pipeline.transformer.forward)
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(dict(signature.bind(*args, **kwargs).arguments)), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    return found[0]


def assert_same(given: Any, expected: Any, name: Any) -> None:
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(given.float(), expected.float(), rtol=0, atol=0, msg=str(name))
    elif isinstance(expected, (list, tuple)) and expected and isinstance(expected[0], torch.Tensor):
        for one, other in zip(given, expected, strict=True):
            assert_same(one, other, name)
    elif name not in ("joint_attention_kwargs", "attention_kwargs"):
        assert given == expected, name


@every_family
@torch.no_grad()
def test_a_prediction_is_the_call_that_the_pipeline_makes(name):
    setting = FAMILIES[name]
    pipeline = setting.build()
    family = find_family(pipeline)
    assert family.name == name
    latents = torch.randn(2, *setting.latents, generator=torch.Generator().manual_seed(0))
    packed = family.pack(pipeline, latents)
    assert torch.equal(family.unpack(pipeline, packed, 32, 32), latents)
    run = {
        "height": 32,
        "width": 32,
        "num_inference_steps": 2,
        "output_type": "latent",
        **family.smallest_call,
        **setting.call,
    }
    expected = called_with(pipeline, lambda: pipeline(prompt=list(PROMPTS), latents=packed.clone(), **run))
    text = family.encode(pipeline, list(PROMPTS), None)
    timestep = pipeline.scheduler.timesteps[0]
    predicted = []

    def predict() -> None:
        predicted.append(family.predict(pipeline, latents, timestep, text, 1.0))

    given = called_with(pipeline, predict)
    for key, value in expected.items():
        assert_same(given.get(key), value, key)
    assert predicted[0].shape == latents.shape
    timesteps = pipeline.scheduler.timesteps.clone()
    grid = family.grid_arguments(pipeline.scheduler.config, 2, math.prod(setting.latents[-2:]) // setting.patch**2)
    pipeline.scheduler.set_timesteps(**({} if "sigmas" in grid else {"num_inference_steps": 2}), **grid)
    assert torch.equal(pipeline.scheduler.timesteps, timesteps)


@every_family
@torch.no_grad()
def test_text_is_that_of_the_pipeline(name):
    pipeline = FAMILIES[name].build()
    family = find_family(pipeline)
    text = family.encode(pipeline, list(PROMPTS), None)
    assert text.prompt_embeds.shape[-1] == family.text_width(pipeline.transformer.config)
    assert text.negative_prompt_embeds.shape == text.prompt_embeds.shape
    assert torch.equal(text.negative_prompt_embeds[0], text.negative_prompt_embeds[1])
    for index, prompt in enumerate(PROMPTS):
        alone = family.encode(pipeline, [prompt], None)
        for field in family.text_fields:
            tensor = getattr(alone, field)
            given = getattr(text, field)[index, : tensor.shape[1]]
            torch.testing.assert_close(given, tensor[0])
    (ids,) = family.token_ids(pipeline, PROMPTS[0])
    (longer,) = family.token_ids(pipeline, PROMPTS[1])
    assert len(longer) == len(ids) + 3
    if text.attention_mask is not None:
        assert text.attention_mask.sum(1).tolist() == [len(read) + FAMILIES[name].padding for read in (ids, longer)]


def test_pictures_become_the_latents_that_flux2_reads():
    pipeline = tiny_flux2_pipeline()
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        family, vae = find_family(pipeline), pipeline.vae
        offset, factor = family.latent_scale(vae)
        of_vae = vae.encode(pixels).latent_dist.mode()
        latents = (family.from_vae(pipeline, of_vae) - offset) * factor
        torch.testing.assert_close(latents, pipeline._encode_vae_image(pixels, None))
        assert torch.equal(family.to_vae(pipeline, family.from_vae(pipeline, of_vae)), of_vae)
        # What the pipeline returns is the VAE's.
        torch.testing.assert_close(family.drawn(pipeline, of_vae, 32, 32), latents)


def test_a_text_of_a_chat_is_aligned_past_its_template():
    pipeline = tiny_flux2_pipeline()
    handed = denoiser_arguments(pipeline, ["a three", "a red nine"], max_sequence_length=20)["encoder_hidden_states"]
    places = token_alignment(pipeline, ["a three"], ["a red nine"], handed.shape[1])[0].tolist()
    (ids,) = find_family(pipeline).token_ids(pipeline, "a three")
    word = ids.index(pipeline.tokenizer(" three").input_ids[0])
    assert places[:word] == list(range(word))
    assert places[word:-1] == list(range(word + 1, handed.shape[1]))


def test_flux2_reads_a_smaller_text_encoder_to_its_end():
    pipeline = tiny_flux2_pipeline()
    family = find_family(pipeline)
    assert family.text_call(pipeline) == {}
    pipeline.text_encoder.config.num_hidden_layers, pipeline.tokenizer.model_max_length = 6, 24
    assert family.text_call(pipeline) == {"max_sequence_length": 24, "text_encoder_out_layers": (2, 4, 6)}
    assert family.encode(pipeline, list(PROMPTS), None).prompt_embeds.shape == (2, 24, 96)
    handed = denoiser_arguments(pipeline, list(PROMPTS))["encoder_hidden_states"]
    assert handed.shape == (2, 24, 96)


def test_checkpointing_changes_what_chroma_predicts_as_is_said():
    pipeline = tiny_chroma_pipeline()
    family, transformer = find_family(pipeline), pipeline.transformer
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = family.encode(pipeline, list(PROMPTS), None)
    plain = family.predict(pipeline, latents, torch.tensor(500.0), text, 1.0)
    transformer.enable_gradient_checkpointing()
    changed = family.predict(pipeline, latents, torch.tensor(500.0), text, 1.0)
    assert family.checkpointing_fault
    assert not torch.allclose(plain, changed)
