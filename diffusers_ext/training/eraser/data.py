"""What an eraser is trained on: clips of the teacher, of videos or of noise, and the text that belongs to them."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_video
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from diffusers_ext.core.pictures import (
    FoundFiles,
    is_hidden,
    model_pixels,
    read_first_frames,
    read_picture,
    rgb_picture,
    why_no_picture,
)
from diffusers_ext.core.restored_state import module_eval_mode
from diffusers_ext.core.seeds import stream_generator
from diffusers_ext.eraser.batch import prompt_length
from diffusers_ext.eraser.concepts import concept_token_mask
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.teacher.collect import collect_teacher_samples
from diffusers_ext.eraser.teacher.runs import EraserText
from diffusers_ext.families import find_family
from diffusers_ext.families.family import Family, Velocity
from diffusers_ext.families.velocity import latent_scale

logger = logging.getLogger(__name__)

ANIMATIONS = (".gif", ".webp", ".apng")
CODED = (".mp4", ".mov", ".avi", ".mkv", ".webm")
# Of `latents_source="noise"`; each is noised anew whenever it comes up.
_NUM_NOISES = 4096


def list_videos(folder: Path) -> list[Path]:
    """Videos of a folder by name: its video files, and its folders that hold pictures.

    The log tells how many of how many entries are read, and which are not and why. Raises `ValueError` where there is
    no such folder, or no video in it.
    """
    if not folder.is_dir():
        raise ValueError(f"`video_dir` must be a folder of videos, got {folder}: no such folder.")
    entries = {path: _why_no_video(path) for path in sorted(folder.iterdir())}
    passed_over = {path.name: reason for path, reason in entries.items() if reason is not None}
    found = FoundFiles(
        folder, tuple(path for path, reason in entries.items() if reason is None), passed_over, "videos"
    )
    if not found.paths:
        raise ValueError(
            f"`video_dir` must hold videos ({', '.join(ANIMATIONS + CODED)}, or folders of "
            f"pictures), got none. {found.summary()}"
        )
    logger.info(found.summary())
    return list(found.paths)


def _why_no_video(path: Path) -> str | None:
    if is_hidden(path):
        return "hidden or of the system"
    if path.is_dir():
        return None if _pictures(path) else "folders without pictures"
    if path.suffix.lower() not in ANIMATIONS + CODED:
        return "of another format"
    return None if path.is_file() else "links to nothing or no plain files"


def read_video(path: Path, num_frames: int, height: int, width: int) -> np.ndarray:
    """The first frames of a video, scaled to cover the size and cropped around the centre.

    They are `(num_frames, height, width, 3)` uint8. Raises `ValueError` for a video that cannot be read or has fewer
    frames, `ImportError` for a coded one where no package reads it.
    """
    try:
        frames = [
            np.asarray(ImageOps.fit(rgb_picture(frame), (width, height), Image.BICUBIC))
            for frame in islice(_frames(path), num_frames)
        ]
    except (UnidentifiedImageError, OSError, EOFError) as error:
        raise ValueError(f"{path} must be a video that can be read, got: {error}.") from error
    if len(frames) < num_frames:
        raise ValueError(
            f"{path} must have at least {num_frames} frames, got {len(frames)}. Take it out, or train on fewer frames."
        )
    return np.stack(frames)


def _frames(path: Path) -> Iterator[Image.Image]:
    if path.is_dir():
        for picture in _pictures(path):
            yield read_picture(picture)
    elif path.suffix.lower() in ANIMATIONS:
        with Image.open(path) as animation:
            yield from _animation_frames(animation)
    else:
        missing = [n for n in ("imageio", "imageio_ffmpeg") if not importlib.util.find_spec(n)]
        if missing:
            raise ImportError(
                f"{path.name} needs the packages imageio and imageio-ffmpeg, got no "
                f"{' and no '.join(missing)}. Install them, or use gifs or folders of pictures."
            )
        yield from load_video(str(path))


def _animation_frames(animation: Image.Image) -> Iterator[Image.Image]:
    """Frames at the rate of the shortest: writers join equal frames to one that is shown longer."""
    times = [frame.info.get("duration", 0) for frame in ImageSequence.Iterator(animation)]
    shortest = min((time for time in times if time > 0), default=0)
    for time, frame in zip(times, ImageSequence.Iterator(animation), strict=True):
        yield from repeat(frame, max(1, round(time / shortest)) if shortest else 1)


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if why_no_picture(path) is None)


class ClipSize(NamedTuple):
    """Frames and pixels of the clips that an eraser is trained on."""

    num_frames: int
    height: int
    width: int

    @classmethod
    def of_configs(cls, family: Family, transformer: Any, vae: Any, **given: int | None) -> ClipSize:
        """The given sizes, and those that the model, by its configs, was made for where none is given."""
        own = cls(*family.clip_size(transformer.config, vae.config))
        return own._replace(**{name: size for name, size in given.items() if size is not None})

    @classmethod
    def of_pipeline(cls, pipeline: DiffusionPipeline) -> ClipSize:
        """The size that a pipeline's model was made for."""
        family = find_family(pipeline, "eraser")
        return cls.of_configs(family, getattr(pipeline, family.denoiser), pipeline.vae)

    def latent_shape(self, pipeline: DiffusionPipeline) -> tuple[int, int, int, int]:
        """`(frames, channels, height, width)` of such a clip; see `VideoFamily.latent_shape`."""
        family = find_family(pipeline, "eraser")
        return family.latent_shape(getattr(pipeline, family.denoiser).config, pipeline.vae.config, *self)

    def velocity(
        self,
        pipeline: DiffusionPipeline,
        expert: str | None = None,
        *,
        guidance_scale: float | None = None,
        image_latents: torch.Tensor | None = None,
    ) -> Velocity:
        """The velocity of a pipeline's model for such a clip; `expert` as of `Family.velocity`.

        `guidance_scale` is for models that take it as an input, `image_latents` for those that begin with a picture.
        """
        family = find_family(pipeline, "eraser")
        given: dict[str, Any] = {"expert": expert, "image_latents": image_latents}
        if family.embedded_guidance(getattr(pipeline, family.denoiser).config):
            given["guidance_scale"] = guidance_scale
        return family.velocity(pipeline, *self, **{n: value for n, value in given.items() if value is not None})


@dataclass(frozen=True)
class FirstFrames:
    """Pictures that the clips of an image-to-video model begin with."""

    pictures: list[Image.Image]  # of the clips' size
    latents: torch.Tensor  # (pictures, frames, channels, height, width), as the model reads them

    @classmethod
    def read(
        cls, pipeline: DiffusionPipeline, folder: str | os.PathLike, size: ClipSize, *, seed: int = 0
    ) -> FirstFrames:
        """The pictures of a folder, scaled to cover the size and cropped around the centre."""
        found = read_first_frames(folder, size.height, size.width)
        return cls(found, picture_latents(pipeline, found, size, seed=seed))


def picture_latents(
    pipeline: DiffusionPipeline, pictures: Sequence[Image.Image | np.ndarray], size: ClipSize, *, seed: int = 0
) -> torch.Tensor:
    """What an image-to-video model reads of first frames; posteriors are sampled by `seed`."""
    generators = [stream_generator(seed, "first frames", index) for index in range(len(pictures))]
    shape = size.latent_shape(pipeline)
    return find_family(pipeline, "eraser").image_latents(pipeline, model_pixels(pictures), shape, generators)


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
        generator = stream_generator(self.seed, "latents", index)
        return {"x_0": torch.randn(self.latent_shape, generator=generator)}


class VideoSource(Dataset):
    """Latents of the videos in a folder (see `list_videos`, `read_video`), encoded once and kept in memory.

    Items are `{"x_0": (frames, channels, height, width) float32}`, scaled as the transformer reads them. Latent frames
    that CogVideoX 1.5 needs besides repeat the first one; the pipeline drops the same ones. For an image-to-video
    model, channels of the clip's first frame follow, which are its `image_latents`. The posterior is sampled by
    `seed`. Raises `ValueError` for a size that the model cannot take.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, video_dir: str | os.PathLike, size: ClipSize, *, seed: int = 0
    ) -> None:
        shape, family = size.latent_shape(pipeline), find_family(pipeline, "eraser")
        self.paths = list_videos(Path(video_dir))
        latents, first = [], []
        for index, path in enumerate(tqdm(self.paths, desc="encode videos")):
            frames = torch.from_numpy(read_video(path, *size))
            generator = stream_generator(seed, "latents", index)
            encoded = encode_frames(pipeline.vae, frames, generator, family)
            first.append(frames[0].numpy())
            padding = encoded[:1].expand(shape[0] - len(encoded), -1, -1, -1)
            latents.append(torch.cat([padding, encoded]))
        self.latents, self.image_latents = torch.stack(latents), None
        if family.image_channels(getattr(pipeline, family.denoiser).config):
            self.image_latents = picture_latents(pipeline, first, size, seed=seed)
            self.latents = torch.cat([self.latents, self.image_latents], dim=2)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x_0": self.latents[index]}


@torch.no_grad()
def encode_frames(
    vae: torch.nn.Module, frames: torch.Tensor, generator: torch.Generator, family: Family | None = None
) -> torch.Tensor:
    """One video `(frames, height, width, 3)` uint8 as latents of the transformer.

    They are `(latent frames, channels, height, width)` float32 on the CPU, scaled as the transformer reads them.
    """
    offset, factor = (latent_scale if family is None else family.latent_scale)(vae)
    # The VAE wants (batch, 3, frames, height, width) in [-1, 1], and gives channels before frames.
    pixels = frames.permute(3, 0, 1, 2)[None].to(vae.device, torch.float32) / 127.5 - 1.0
    with module_eval_mode(vae):
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.sample(generator)
    return ((latents[0].float().transpose(0, 1) - offset) * factor).cpu()


@dataclass(frozen=True)
class EraserData:
    """What a training reads, with no text encoder any more."""

    text: EraserText
    token_mask: torch.Tensor | None  # (target prompts, text) bool, the concept's; `None` without masks
    samples: Dataset  # of the teacher, or clean latents
    size: ClipSize
    expert: str | None = None  # whose samples they are, where a model has several transformers
    first_frames: FirstFrames | None = None  # for image-to-video models

    @property
    def image_latents(self) -> torch.Tensor | None:
        """What an image-to-video model reads of first frames: those given, or those of the videos."""
        given = self.first_frames
        return getattr(self.samples, "image_latents", None) if given is None else given.latents


def concept_tokens(
    pipeline: DiffusionPipeline, target: Sequence[str], recipe: EraserTraining, concept: str | None
) -> torch.Tensor | None:
    """Where the concept stands in each target prompt; `None` where the recipe asks for no masks."""
    if not recipe.localization_weight:
        return None
    if concept is None:
        raise ValueError(
            "`concept` must be given where `localization_weight` is not 0, got None. Masks are made of "
            "the attention to its tokens."
        )
    family = find_family(pipeline, "eraser")
    if not family.locates_concepts:
        raise ValueError(
            f"`localization_weight` must be 0 for {family.title}, of which no attention to a concept is read, got "
            f"{recipe.localization_weight}."
        )
    cleaned = [family.clean_prompt(prompt) for prompt in target]
    return concept_token_mask(pipeline.tokenizer, cleaned, concept, prompt_length(pipeline))


def make_samples(
    pipeline: DiffusionPipeline,
    text: EraserText,
    token_mask: torch.Tensor | None,
    recipe: EraserTraining,
    size: ClipSize,
    *,
    video_dir: str | Path | None = None,
    expert: str | None = None,
    image_latents: torch.Tensor | None = None,
    **collection: Any,
) -> Dataset:
    """The samples of a recipe: teacher trajectories, or clean latents of `video_dir` or of noise.

    The pipeline may have erasers, which the teacher switches off. Of a model with several transformers, trajectories
    are kept where `expert` is asked; of an image-to-video model, run `i` begins with picture `i` of `image_latents`,
    counted round. `collection` are further arguments of `collect_teacher_samples`: `directory` and
    `facts`, ...
    """
    shape = size.latent_shape(pipeline)
    if recipe.latents_source == "noise":
        return NoiseSource(shape, _NUM_NOISES, seed=recipe.seed)
    if recipe.latents_source == "video":
        if video_dir is None:
            raise ValueError("`video_dir` must be given for `latents_source` 'video', got None.")
        return VideoSource(pipeline, video_dir, size, seed=recipe.seed)
    scale = recipe.sampling_guidance_scale
    velocity = size.velocity(pipeline, expert, guidance_scale=scale, image_latents=image_latents)
    return collect_teacher_samples(
        velocity, pipeline.scheduler, text, recipe, shape, token_mask=token_mask, **collection
    )


def samples_facts(samples: Dataset) -> dict[str, Any]:
    """What tells one training's samples from another's, as JSON: how many, and sums over two of them."""
    ends = {"first": samples[0], "last": samples[len(samples) - 1]}
    return {"length": len(samples), **{name: tensor.double().sum().item() for name, tensor in sorted(_tensors(ends))}}


def _tensors(item: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in item.items():
        if isinstance(value, dict):
            yield from _tensors(value, f"{prefix}{name}.")
        else:
            yield prefix + name, torch.as_tensor(value)
