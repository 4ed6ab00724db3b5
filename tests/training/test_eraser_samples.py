from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffusers_ext.families.wan import Wan
from diffusers_ext.training.eraser.data import ClipSize, NoiseSource, VideoSource, encode_frames
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.tiny_current_pipelines import tiny_wan_pipeline
from tests.training.test_video_files import moving_square, write_gif, write_pictures

SIZE = ClipSize(9, 16, 16)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_video_pipeline()


@pytest.fixture
def folder(tmp_path):
    clip = moving_square(9, 16, 16)
    write_gif(tmp_path / "b.gif", clip)
    write_pictures(tmp_path / "a", clip[::-1])
    return tmp_path


def test_noise_depends_on_seed_and_index_alone():
    source = NoiseSource((3, 4, 4, 4), 5, seed=1)
    assert len(source) == 5
    assert torch.equal(source[3]["x_0"], NoiseSource((3, 4, 4, 4), 9, seed=1)[3]["x_0"])
    assert not torch.equal(source[3]["x_0"], source[4]["x_0"])
    assert not torch.equal(source[3]["x_0"], NoiseSource((3, 4, 4, 4), 5, seed=2)[3]["x_0"])
    batch = next(iter(DataLoader(source, batch_size=5)))["x_0"]
    assert batch.shape == (5, 3, 4, 4, 4)
    assert abs(batch.std() - 1) < 0.1
    with pytest.raises(IndexError, match="from 0 to 4, got 5"):
        source[5]
    with pytest.raises(ValueError, match="`length` must be at least 1, got 0"):
        NoiseSource((3, 4, 4, 4), 0)


def test_videos_become_the_latents_that_the_transformer_reads(pipeline, folder):
    pipeline.vae.train()
    try:
        source = VideoSource(pipeline, folder, SIZE)
        assert all(module.training for module in pipeline.vae.modules())
    finally:
        pipeline.vae.eval()
    assert [path.name for path in source.paths] == ["a", "b.gif"]
    assert len(source) == 2
    clip = torch.from_numpy(moving_square(9, 16, 16)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        posterior = pipeline.vae.encode(clip).latent_dist
    factor = pipeline.vae.config.scaling_factor
    latents = source[1]["x_0"]
    assert latents.shape == (3, 4, 4, 4)
    noise = (latents.transpose(0, 1)[None] / factor - posterior.mean) / posterior.std
    assert abs(noise.mean()) < 0.3
    assert 0.8 < noise.std() < 1.2
    assert not torch.equal(latents, source[0]["x_0"])


def test_videos_are_encoded_alike_again(pipeline, folder):
    first, second = (VideoSource(pipeline, folder, SIZE) for _ in range(2))
    assert torch.equal(first.latents, second.latents)
    other = VideoSource(pipeline, folder, SIZE, seed=1)
    assert not torch.equal(first.latents, other.latents)


def test_frames_that_patches_need_repeat_the_first_one(folder):
    pipeline = tiny_video_pipeline(patch_size_t=2, sample_height=8, sample_width=8)
    latents = VideoSource(pipeline, folder, SIZE)[1]["x_0"]
    assert latents.shape == (4, 4, 4, 4)
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[1], latents[2])


def test_frames_the_model_cannot_take_are_refused(pipeline, folder):
    with pytest.raises(ValueError, match="`num_frames` must be a multiple of 8 plus 1"):
        VideoSource(pipeline, folder, ClipSize(8, 16, 16))
    with pytest.raises(ValueError, match="must have at least 17 frames, got 9"):
        VideoSource(pipeline, folder, ClipSize(17, 16, 16))


def test_latents_are_float32_whatever_the_vae(pipeline):
    vae = tiny_video_pipeline().vae.to(torch.bfloat16)
    frames = torch.from_numpy(np.ascontiguousarray(moving_square(9, 16, 16)))
    latents = encode_frames(vae, frames, torch.Generator().manual_seed(0))
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()


def test_latents_of_wan_are_normalised_as_its_pipeline_expects():
    vae = tiny_wan_pipeline().vae
    frames = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    latents = encode_frames(vae, frames, torch.Generator().manual_seed(0), Wan())
    assert latents.shape == (2, 4, 4, 4)
    with torch.no_grad():
        pixels = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        own = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0))[0].transpose(0, 1)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(latents * std + mean, own)
