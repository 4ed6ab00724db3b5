"""Clean latents for an eraser's training without teacher samples: of videos, or of mere noise."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from diffusers_ext.core.quiet_run import module_eval_mode
from diffusers_ext.core.seeds import stream_generator
from diffusers_ext.families.registry import find_family
from training.video_files import list_videos, read_video


class NoiseSource(Dataset):
    """Latents that are normal noise: cheap, and unlike any clip at all but the highest timesteps.

    Items are `{"x_0": (frames, channels, height, width) float32}`.
    """

    def __init__(self, latent_shape: Sequence[int], length: int, *, seed: int = 0) -> None:
        if length < 1:
            raise ValueError(f"`length` must be at least 1, got {length}.")
        self.latent_shape, self.length, self.seed = tuple(latent_shape), length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"`index` must be from 0 to {self.length - 1}, got {index}.")
        return {
            "x_0": torch.randn(
                self.latent_shape, generator=stream_generator(self.seed, "latents", index)
            )
        }


class VideoSource(Dataset):
    """Latents of the videos in a folder, encoded once and kept in memory.

    Items are `{"x_0": (frames, channels, height, width) float32}`, scaled as the transformer
    reads them. Latent frames that CogVideoX 1.5 needs besides repeat the first one; the pipeline
    drops the same ones.

    Args:
        pipeline: a CogVideoX pipeline; its VAE encodes.
        video_dir: gif, webp or mp4 files, or one folder of pictures per video.
        num_frames: the first frames of each video.
        height, width: pixels; videos are scaled to cover the size, and cropped.
        seed: of the posterior's samples.

    Raises:
        ValueError: a size the model cannot take, no videos, or one with too few frames.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        video_dir: str | os.PathLike,
        num_frames: int,
        height: int,
        width: int,
        *,
        seed: int = 0,
    ) -> None:
        shape = find_family(pipeline, "eraser").latent_shape(
            pipeline.transformer.config, pipeline.vae.config, num_frames, height, width
        )
        self.paths = list_videos(Path(video_dir))
        latents = []
        for index, path in enumerate(tqdm(self.paths, desc="encode videos")):
            frames = torch.from_numpy(read_video(path, num_frames, height, width))
            encoded = encode_frames(pipeline.vae, frames, stream_generator(seed, "latents", index))
            padding = encoded[:1].expand(shape[0] - len(encoded), -1, -1, -1)
            latents.append(torch.cat([padding, encoded]))
        self.latents = torch.stack(latents)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x_0": self.latents[index]}


@torch.no_grad()
def encode_frames(
    vae: torch.nn.Module, frames: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """One video `(frames, height, width, 3)` uint8 as latents of the transformer.

    They are `(latent frames, channels, height, width)` float32 on the CPU, times the scaling factor.
    """
    # The VAE wants (batch, 3, frames, height, width) in [-1, 1], and gives channels before frames.
    pixels = frames.permute(3, 0, 1, 2)[None].to(vae.device, torch.float32) / 127.5 - 1.0
    with module_eval_mode(vae):
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.sample(generator)
    return (latents[0].float() * vae.config.scaling_factor).transpose(0, 1).cpu()
