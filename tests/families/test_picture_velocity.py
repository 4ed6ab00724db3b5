"""Image models as an eraser's training asks them: what their own pipelines do."""

from typing import Any, NamedTuple

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from diffusers_ext.eraser.teacher.trajectory import teacher_trajectory
from diffusers_ext.families import find_family
from diffusers_ext.families.text_conditioning import token_embeds
from tests.tiny_current_pipelines import tiny_flux2_pipeline, tiny_z_image_pipeline
from tests.tiny_image_pipelines import tiny_sd3_pipeline
from tests.tiny_pipelines import sdxl_pipeline

PROMPTS = ["a red three", "a photo of the blue nine"]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'


def sdxl_with_euler():
    """As the checkpoint has it."""
    pipeline = sdxl_pipeline()
    pipeline.scheduler = EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)
    return pipeline


class Setting(NamedTuple):
    build: Any
    shape: tuple[int, int, int, int]  # of latents at 32 x 32 pixels
    size: tuple[int, int]  # that the model was made for
    multiple: int


SETTINGS = {
    "flux2": Setting(tiny_flux2_pipeline, (1, 16, 8, 8), (256, 256), 4),
    "z_image": Setting(tiny_z_image_pipeline, (1, 4, 8, 8), (512, 512), 8),
    "sd3": Setting(tiny_sd3_pipeline, (1, 16, 8, 8), (32, 32), 8),
    "sdxl": Setting(sdxl_pipeline, (1, 4, 8, 8), (32, 32), 4),
    "sdxl with Euler": Setting(sdxl_with_euler, (1, 4, 8, 8), (32, 32), 4),
}


@pytest.fixture(scope="module", params=SETTINGS)
def setting(request):
    return SETTINGS[request.param]


@pytest.fixture(scope="module")
def pipeline(setting):
    return setting.build()


@torch.no_grad()
def test_a_velocity_and_a_run_are_those_of_the_pipeline(setting, pipeline):
    family = find_family(pipeline)
    text = family.encode_clip_prompts(pipeline, [*PROMPTS, ""])
    velocity = family.velocity(pipeline, 1, 32, 32)
    latents = torch.randn(2, *setting.shape, generator=torch.Generator().manual_seed(1))
    call = {"num_inference_steps": 3, "guidance_scale": 3.0}
    outputs = []
    denoiser = getattr(pipeline, family.denoiser)
    hook = denoiser.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    passed = []

    def keep(_, __, ___, values):
        passed.append(family.clip_latents(values["latents"], setting.shape))
        return {}

    given = {**family.text_call(pipeline), "height": 32, "width": 32, "output_type": "latent", **call}
    try:
        # A copy, because Z-Image's pipeline writes its chat template into the list.
        pipeline(prompt=list(PROMPTS), latents=latents[:, 0], callback_on_step_end=keep, **given)
    finally:
        hook.remove()
    points = list(teacher_trajectory(velocity, pipeline.scheduler, latents, text[:2], text[[2, 2]], **call))
    found = torch.stack([point.x_next for point in points])
    torch.testing.assert_close(found, torch.stack(passed), atol=1e-4, rtol=1e-4)
    # The first step's predictions, with guidance in one batch or in two.
    asked = outputs[0] if len(outputs) == 3 else torch.cat([outputs[1], outputs[0]])
    if isinstance(asked, list):  # Z-Image's, that point to the picture, of the prompts first
        asked = -torch.stack(asked[2:] + asked[:2]).squeeze(2)
    expected = family.clip_latents(asked, setting.shape)
    both = torch.cat([points[0].negative, points[0].velocity])
    torch.testing.assert_close(both, expected.float(), atol=1e-5, rtol=1e-4)
    # Encoded prompts lead the call to the same.
    encoded = family.clip_arguments(text[:2], text[[2, 2]], latents)
    passed.clear()
    pipeline(**encoded, callback_on_step_end=keep, **given)
    torch.testing.assert_close(found, torch.stack(passed), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 0.5])
@torch.no_grad()
def test_z_image_counts_its_scale_from_0(scale):
    pipeline = tiny_z_image_pipeline()
    family, calls = find_family(pipeline), []
    text = family.encode_clip_prompts(pipeline, [*PROMPTS, ""])
    latents = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"num_inference_steps": 3, "guidance_scale": scale}
    pipeline.transformer.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    size = {"height": 32, "width": 32, "output_type": "latent"}
    expected = pipeline(prompt=list(PROMPTS), latents=latents[:, 0], **size, **call).images
    assert calls == [2 if scale == 0 else 4] * 3
    velocity = family.velocity(pipeline, 1, 32, 32)
    *_, last = teacher_trajectory(velocity, pipeline.scheduler, latents, text[:2], text[[2, 2]], **call)
    assert calls[3:] == calls[:3]
    torch.testing.assert_close(last.x_next[:, 0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_another_denoiser_answers_in_its_place(setting, pipeline):
    family = find_family(pipeline)
    text = family.encode_clip_prompts(pipeline, PROMPTS)
    velocity = family.velocity(pipeline, 1, 32, 32)
    x_t, t = torch.randn(2, *setting.shape), torch.tensor([900, 400])
    before = velocity(x_t, t, text)
    velocity.transformer = setting.build().to(torch.bfloat16).components[family.denoiser]
    found = velocity(x_t, t, text)
    assert found.dtype == torch.float32
    assert not torch.equal(found, before)
    torch.testing.assert_close(found, before, atol=0.1, rtol=0.1)


def test_sizes_are_those_of_the_model(setting, pipeline):
    family = find_family(pipeline)
    configs = getattr(pipeline, family.denoiser).config, pipeline.vae.config
    assert family.latent_shape(*configs, 1, 32, 32) == setting.shape
    assert family.clip_size(*configs) == (1, *setting.size)
    for size, message in (
        ((2, 32, 32), "`num_frames` must be 1 for a model that draws pictures, got 2"),
        ((1, 33, 32), f"`height` must be a positive multiple of {setting.multiple} .* The nearest is 32"),
        ((1, 32, 0), f"`width` must be a positive multiple of {setting.multiple} "),
    ):
        with pytest.raises(ValueError, match=message):
            family.latent_shape(*configs, *size)


@torch.no_grad()
def test_bad_input_is_refused(setting, pipeline):
    family = find_family(pipeline)
    velocity, text = family.velocity(pipeline, 1, 32, 32), family.encode_clip_prompts(pipeline, PROMPTS)
    x_t, t = torch.randn(2, *setting.shape), torch.tensor([900, 400])
    for arguments, error, message in (
        ((x_t[:, 0], t, text), ValueError, r"`x_t` must be \(batch, 1, "),
        ((x_t, t[:1], text), ValueError, r"`t` must be \(2,\)"),
        ((x_t, t, text[:1]), ValueError, r"`prompt_embeds` must be \(2, text, "),
        (
            (x_t, t, token_embeds(text)[..., :5]),
            ValueError,
            r"`prompt_embeds` must (be \(2, text, |hold \['(pooled|attention))",
        ),
    ):
        with pytest.raises(error, match=message):
            velocity(*arguments)
