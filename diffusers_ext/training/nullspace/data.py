"""DreamBooth's pictures and prompts for Stable Diffusion and SDXL: read, encoded once, drawn."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch.utils.data import ConcatDataset, Dataset, TensorDataset
from tqdm.auto import tqdm

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.core.pictures import (
    find_pictures,
    is_caption,
    is_hidden,
    model_pixels,
    read_picture,
    why_no_picture,
)
from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.core.settings import SamplingSettings
from diffusers_ext.core.text_files import one_line, read_rows, read_text
from diffusers_ext.families import Family, find_family, match_family
from diffusers_ext.families.text_conditioning import stack_texts
from diffusers_ext.nullspace.settings import SubjectSettings
from diffusers_ext.nullspace.step import GUIDANCE, Condition

logger = get_logger(__name__)

TEXT_SUFFIXES = (".txt", ".caption")
TABLES = ("metadata.jsonl", "metadata.csv")


def read_captions(folder: str | Path, name: str = "instance_data_dir") -> dict[str, str]:
    """The captions of a folder of pictures by the names of these; a line break in one becomes a space.

    A text file belongs to all pictures whose name it has but for the ending. A table has the columns `file_name` and
    `text`, as `datasets` reads them. Raises `ValueError`, which names the argument, for an empty caption, one for a
    picture that is not there, or two for one picture.
    """
    found = find_pictures(folder, name)
    pictures = [path.name for path in found.paths]
    captions: dict[str, str] = {}
    sources: dict[str, str] = {}
    for path in sorted(path for path in found.folder.iterdir() if _holds_captions(path)):
        if path.name.lower() in TABLES:
            rows = [(w, row["file_name"], row["text"]) for w, row in read_rows(path, ["file_name", "text"])]
        else:
            rows = _text_rows(path, pictures)
        for where, picture, text in rows:
            caption = one_line(text)
            if picture not in pictures:
                raise ValueError(
                    f"The caption in {where} must be of a picture in {found.folder}, got {picture!r}, which "
                    "is not read there. Name it as the picture is named, or take it out."
                )
            if not caption:
                raise ValueError(
                    f"The caption of {picture!r} in {where} must not be empty. Write one, or take it out: "
                    "the picture is then trained with the instance prompt."
                )
            if picture in captions:
                raise ValueError(
                    f"{Path(found.folder, picture)} must have one caption, got two: in "
                    f"{sources[picture]} and in {where}. Take one out."
                )
            captions[picture], sources[picture] = caption, where
    return captions


def _holds_captions(path: Path) -> bool:
    name = path.name.lower()
    ending = name in TABLES or path.suffix.lower() in TEXT_SUFFIXES
    return ending and not is_hidden(path) and not path.is_dir()


def _text_rows(path: Path, pictures: Sequence[str]) -> list[tuple[str, str, str]]:
    """A row for each picture of the file's name, else one for a picture that is not there."""
    named = [picture for picture in pictures if Path(picture).stem == path.stem]
    text = read_text(path) if named else ""
    return [(str(path), picture, text) for picture in named or [path.stem]]


def picture_prompts(settings: SubjectSettings) -> list[str]:
    """What each picture of the subject is trained with, in their order: its caption or the instance prompt."""
    captions = read_captions(settings.instance_data_dir)
    paths = find_pictures(settings.instance_data_dir, "instance_data_dir").paths
    return [captions.get(path.name, settings.instance_prompt) for path in paths]


def subject_prompts(settings: SubjectSettings) -> list[str]:
    """The instance prompt and the captions, each once: what the subject is asked for by."""
    return list(dict.fromkeys([settings.instance_prompt, *picture_prompts(settings)]))


def caption_facts(settings: SubjectSettings) -> dict[str, str]:
    """What a checkpoint must agree with: nothing without captions, so that older ones go on."""
    if not read_captions(settings.instance_data_dir):
        return {}
    prompts = json.dumps(picture_prompts(settings))
    return {"captions": hashlib.sha256(prompts.encode()).hexdigest()}


def tell_of_captions(settings: SubjectSettings) -> None:
    """Log how many pictures have captions and where these come from; warn of files that are not read."""
    found = find_pictures(settings.instance_data_dir, "instance_data_dir")
    captions = read_captions(settings.instance_data_dir)
    unread = [name for name in found.passed_over if is_caption(name)]
    unread = [name for name in unread if not _holds_captions(found.folder / name)]
    unread = [name for name in unread if not is_hidden(found.folder / name)]
    if unread:
        logger.warning(
            f"{', '.join(unread[:5])} may hold captions and is not read: they are taken from a .txt file "
            f"beside each picture, or from {' or '.join(TABLES)}."
        )
    if not captions:
        return
    tables = [name for name in found.passed_over if name.lower() in TABLES]
    origin = " and ".join(tables) if tables else "text files beside them"
    rest = len(found.paths) - len(captions)
    logger.info(
        f"{len(captions)} of {len(found.paths)} pictures are trained with captions of their own, from "
        f"{origin}; {rest} with --instance_prompt."
    )


def warn_of_missing_words(settings: SubjectSettings, preserved: Sequence[str]) -> None:
    """Warn of captions that leave out the subject's name.

    Words of the instance prompt that no preserved prompt has may be the name; without any nothing tells it from other
    words.
    """
    captions = read_captions(settings.instance_data_dir) if preserved else {}
    for word in sorted(_words(settings.instance_prompt) - _words(" ".join(preserved))):
        without = [name for name, caption in captions.items() if word not in _words(caption)]
        if without:
            logger.warning(
                f"{len(without)} captions ({without[0]}, ...) lack {word!r}, which the instance prompt has "
                "and no preserved prompt: their pictures do not teach it. Put it into them if it names "
                "the subject."
            )


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def aspect_buckets(resolution: int, multiple: int, longest: int | None = None) -> list[tuple[int, int]]:
    """Sizes `(height, width)` between 1:2 and 2:1 whose area is about that of a square, and no larger; the square too.

    Other sides are multiples of `multiple` pixels about a sixteenth of `resolution` apart, and none longer than
    `longest`: at 1024 they are multiples of 64, as SDXL was trained on (arXiv 2307.01952, section 2.3).

    Raises:
        ValueError: a square that is no multiple, or too small for another size.
    """
    if resolution % multiple:
        raise ValueError(f"`resolution` must be a multiple of {multiple} for this model, got {resolution}.")
    step = multiple * math.ceil(resolution / (16 * multiple))
    longest = 2 * resolution if longest is None else longest
    found = {(resolution, resolution)}
    for side in range(step, longest + 1, step):
        other = resolution**2 // side // step * step
        if max(side, other) <= min(2 * side, 2 * other, longest):
            found |= {(side, other), (other, side)}
    if len(found) == 1:
        raise ValueError(
            f"`resolution` must have other sizes of its area for `--aspect_buckets`, got {resolution} with sides in "
            f"steps of {step} up to {longest}. Give another, or leave the flag out."
        )
    return sorted(found, key=lambda size: (size[0] / size[1], size))


def pictures_by_size(paths: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[Path]]:
    """The pictures that each size `(height, width)` is nearest to by its aspect ratio; sizes without any left out."""
    found: dict[tuple[int, int], list[Path]] = {size: [] for size in sizes}
    for path in paths:
        width, height = read_picture(path).size
        far = {size: abs(math.log(size[0] / size[1] * width / height)) for size in sizes}
        found[min(sizes, key=far.__getitem__)].append(path)
    return {size: members for size, members in found.items() if members}


def own_sizes(settings: SubjectSettings, pipeline: DiffusionPipeline) -> list[tuple[int, int]]:
    """The sizes of `--aspect_buckets` that a model can be trained on; raises `ValueError` as `aspect_buckets`."""
    family, config = find_family(pipeline, "nullspace"), denoiser_of(pipeline).config
    multiple, longest = family.pixels_per_latent(pipeline) * family.patch(config), family.longest_side(config)
    return aspect_buckets(settings.resolution, multiple, None if longest is None else longest * multiple)


def own_resolution(pipeline: DiffusionPipeline) -> int | None:
    """Pixels a side of the pictures that a model was made for; `None` where they are not square."""
    family = match_family(pipeline, "nullspace") or Family()
    size = family.sample_size(denoiser_of(pipeline).config)
    sides = {size} if isinstance(size, int) else set(size or ())
    return sides.pop() * family.pixels_per_latent(pipeline) if len(sides) == 1 else None


def sampling_arguments(settings: SamplingSettings) -> dict[str, Any]:
    """Arguments of a pipeline's call from the command line's sampling group."""
    return {
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        # Not the empty string: SDXL reads zeros in place of a prompt that is not given.
        "negative_prompt": settings.negative_prompt or None,
    }


@torch.no_grad()
def draw_images(
    pipeline: DiffusionPipeline, prompts: Sequence[str] | None, seeds: Sequence[int], resolution: int, **run: Any
) -> list[Image.Image]:
    """One picture per prompt, unfiltered and in eval mode; the pipeline is left as it was.

    A picture depends on its prompt and its seed, not on the others (up to rounding). `run` are further arguments of
    the pipeline's call, as of `sampling_arguments`, and the embeddings of prompts that are encoded.
    """
    vae, family = pipeline.vae, find_family(pipeline, "nullspace")
    offset, factor = family.latent_scale(vae)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    config, negative = denoiser_of(pipeline).config, run.pop("negative_prompt", None)
    guided = family.guidance_arguments(config, run.pop("guidance_scale")) if "guidance_scale" in run else {}
    run = {**family.call_arguments, **guided, **run}
    if prompts is None:
        run.pop("negative_prompt", None)  # its embeddings are given
    else:
        negative = run.get("negative_prompt") if negative is None else negative
        # Some pipelines know no such argument.
        run |= {} if negative is None else {"negative_prompt": [negative] * len(generators)}
        run |= {"prompt": list(prompts), **family.text_call(pipeline)}
    with quiet_run(pipeline):
        latents = pipeline(
            height=resolution, width=resolution, generator=generators, output_type="latent", return_dict=False, **run
        )[0]
        latents = family.drawn(pipeline, latents, resolution, resolution)
        latents = family.to_vae(pipeline, latents.float() / factor + offset).to(vae.dtype)
        with torch.autocast(latents.device.type, enabled=False):  # VAEs overflow in float16
            pixels = torch.cat([vae.decode(latent).sample for latent in latents.split(1)])
        pixels = pixels[:, :, 0] if family.video_vae else pixels
    processor = getattr(pipeline, "image_processor", None) or pipeline.video_processor
    return processor.postprocess(pixels, output_type="pil")


def list_images(folder: str | Path, name: str = "instance_data_dir") -> list[Path]:
    """The picture files of a folder in order of name; raises `ValueError` where there is none."""
    return list(find_pictures(folder, name).paths)


def load_image(path: Path, resolution: int | tuple[int, int], center_crop: bool = True) -> torch.Tensor:
    """One picture as `(3, height, width)` float32 in [-1, 1], as `read_picture` sees it.

    `resolution` is `(height, width)` or the side of a square. `center_crop` cuts it out of the middle; without it the
    picture is squeezed. Raises `ValueError` for a file that is no picture.
    """
    image = read_picture(path)
    size = (resolution, resolution) if isinstance(resolution, int) else resolution[::-1]
    if center_crop:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    else:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return model_pixels([image])[0]


@torch.no_grad()
def encode_images(
    pipeline: DiffusionPipeline, paths: list[Path], resolution: int | tuple[int, int], *, center_crop: bool, flip: bool
) -> TensorDataset:
    """Means and standard deviations of pictures' latents, scaled for the denoiser.

    Each is `(channels, height, width)` float32; with `flip` there are twice as many. `resolution` is that of
    `load_image`.
    """
    vae, family = pipeline.vae, find_family(pipeline, "nullspace")
    offset, factor = family.latent_scale(vae)
    means, stds = [], []
    for path in paths:
        pixels = load_image(path, resolution, center_crop)
        for view in [pixels, pixels.flip(-1)] if flip else [pixels]:
            picture = view[None, :, None] if family.video_vae else view[None]
            posterior = vae.encode(picture.to(vae.device, vae.dtype)).latent_dist
            means.append((family.from_vae(pipeline, posterior.mean.float()) - offset) * factor)
            stds.append(family.from_vae(pipeline, posterior.std.float()) * factor)
    return TensorDataset(torch.cat(means), torch.cat(stds))


def with_prompts(dataset: TensorDataset, of_pictures: Sequence[str], prompts: Sequence[str]) -> TensorDataset:
    """`(mean, std, index)` of pictures with captions: the index of each one's prompt among `prompts`, each once.

    `dataset` is of `encode_images`, in which a picture may have several views one after another.
    """
    index = torch.tensor([prompts.index(prompt) for prompt in of_pictures])
    return TensorDataset(*dataset.tensors, index.repeat_interleave(len(dataset) // len(index)))


def subject_latents(settings: SubjectSettings, pipeline: DiffusionPipeline) -> tuple[Dataset, list[int] | None]:
    """Latents of the subject's pictures, with indices of their captions among `subject_prompts` where there are some.

    Beside them the bucket of each sample with `--aspect_buckets`, which go one after another; else `None`.
    """
    paths, prompts, parts = list_images(settings.instance_data_dir), subject_prompts(settings), []
    captions = dict(zip(paths, picture_prompts(settings), strict=True)) if caption_facts(settings) else {}
    found: dict[Any, list[Path]] = {settings.resolution: paths}
    if settings.aspect_buckets:
        found = pictures_by_size(paths, own_sizes(settings, pipeline))
        counts = ", ".join(f"{len(members)} of {width} x {height}" for (height, width), members in found.items())
        logger.info(f"Pictures by width and height: {counts}.")
    crop = not settings.no_center_crop
    for size, members in found.items():
        latents = encode_images(pipeline, members, size, center_crop=crop, flip=settings.random_flip)
        parts.append(with_prompts(latents, [captions[path] for path in members], prompts) if captions else latents)
    if not settings.aspect_buckets:
        return parts[0], None
    return ConcatDataset(parts), [bucket for bucket, part in enumerate(parts) for _ in range(len(part))]


@torch.no_grad()
def encode_condition(pipeline: DiffusionPipeline, prompt: str, guidance_scale: float = GUIDANCE) -> Condition:
    """Encode one prompt once; the text encoder is frozen. `guidance_scale` is as of `Condition`."""
    family = find_family(pipeline, "nullspace")
    return Condition(family.encode(pipeline, [prompt], None).positive(), family, pipeline, guidance_scale)


def encode_conditions(
    pipeline: DiffusionPipeline, prompts: Sequence[str], guidance_scale: float = GUIDANCE
) -> Condition:
    """Encode prompts, each as `encode_condition` does it alone, into the rows of one condition."""
    each = [encode_condition(pipeline, prompt, guidance_scale) for prompt in prompts]
    return dataclasses.replace(each[0], text=stack_texts([one.text for one in each]))


def make_class_images(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    prompt: str,
    count: int,
    *,
    batch_size: int,
    seed: int,
    resolution: int,
    **run: Any,
) -> list[Path]:
    """Fill `folder` up to `count` pictures of the class, drawn by the base model itself.

    `run` goes to the pipeline's call. A killed run goes on where it was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    present = [path for path in folder.iterdir() if why_no_picture(path) is None]
    missing = [i for i in range(count) if not (folder / f"class_{i:05d}.png").exists()]
    missing = missing[: max(0, count - len(present))]
    starts = range(0, len(missing), batch_size)
    for start in tqdm(starts, desc="class pictures", disable=not missing):
        indices = missing[start : start + batch_size]
        seeds = [seed + index for index in indices]
        images = draw_images(pipeline, [prompt] * len(indices), seeds, resolution, **run)
        for index, image in zip(indices, images, strict=True):
            content = io.BytesIO()
            image.save(content, "png")
            write_atomically(folder / f"class_{index:05d}.png", content.getvalue())
    return list_images(folder, "class_data_dir")
