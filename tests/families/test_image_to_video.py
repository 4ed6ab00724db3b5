"""First frames of image-to-video models, as their pipeline reads them."""

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline

from diffusers_ext.eraser.teacher.trajectory import teacher_trajectory
from diffusers_ext.families.cogvideox import CogVideoX
from tests.tiny_cogvideox import tiny_video_pipeline

SIZE = (9, 16, 16)
# As CogVideoX 1.0 and 1.5 have it.
VERSIONS = {
    "1.0": {"in_channels": 8},
    "1.5": {
        "in_channels": 8, "ofs_embed_dim": 8,
        "patch_size": 2, "patch_size_t": 2, "sample_height": 8, "sample_width": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@torch.no_grad()
def test_a_run_is_that_of_the_pipeline(version, guidance_scale):
    pipeline = CogVideoXImageToVideoPipeline(**tiny_video_pipeline(**VERSIONS[version]).components)
    pipeline.set_progress_bar_config(disable=True)
    family, prompts = CogVideoX(), ["a red seven moving right", "a blue two"]
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    shape = family.latent_shape(pipeline.transformer.config, pipeline.vae.config, *SIZE)
    assert family.image_channels(pipeline.transformer.config) == 4

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    image = family.image_latents(pipeline, pictures * 2 - 1, shape, generators())
    assert image.shape == (2, *shape)
    velocity = family.velocity(pipeline, *SIZE, image_latents=image)
    latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 3, "guidance_scale": guidance_scale}
    size = dict(zip(("num_frames", "height", "width"), SIZE))
    expected = pipeline(
        pictures, prompts, negative_prompt=["", ""], latents=latents, generator=generators(), output_type="latent",
        max_sequence_length=12, **size, **call,
    ).frames  # fmt: skip
    texts = pipeline.encode_prompt([*prompts, ""], do_classifier_free_guidance=False, max_sequence_length=12)[0]
    *points, last = teacher_trajectory(
        velocity, pipeline.scheduler, latents, texts[:2], texts[2:].expand(2, -1, -1), **call
    )
    assert expected.shape == last.x_next.shape  # with what 1.5 adds, which its pipeline returns
    torch.testing.assert_close(last.x_next, expected)
    assert points[0].x_t.shape == (2, shape[0], 8, *shape[2:])
    assert torch.equal(velocity.without_image(points[0].x_t), latents)
    # Read with its picture, a state alone says the same.
    found = velocity(points[1].x_t[1:], points[1].t[1:], texts[1:2])
    torch.testing.assert_close(found, points[1].velocity[1:])


@torch.no_grad()
def test_first_frames_are_counted_round():
    pipeline = CogVideoXImageToVideoPipeline(**tiny_video_pipeline(in_channels=8).components)
    image = torch.randn(2, 3, 4, 4, 4)
    velocity = CogVideoX().velocity(pipeline, *SIZE, image_latents=image)
    x_t = velocity.with_image(torch.zeros(3, 3, 4, 4, 4), [1, 2, 5])
    assert torch.equal(x_t[:, :, 4:], image[[1, 0, 1]])
    assert not velocity.without_image(x_t).any()
    plain = CogVideoX().velocity(tiny_video_pipeline(), *SIZE)
    latents = torch.zeros(3, 3, 4, 4, 4)
    assert plain.with_image(latents, range(3)) is latents
    assert torch.equal(plain.without_image(latents), latents)
