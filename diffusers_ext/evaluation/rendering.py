"""Pictures and clips from the same seeds: of two models, with adapters and without, and from given noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from tqdm.auto import tqdm

from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.core.restored_state import eval_mode, quiet_run
from diffusers_ext.core.seeds import stream_seed
from diffusers_ext.eraser.batch import prompt_length
from diffusers_ext.families import Family, find_family, match_family
from diffusers_ext.golden_noise.pairs.dataset import source_noise
from diffusers_ext.golden_noise.redenoise import TOOL


@torch.no_grad()
def render_clips(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    batch_size: int = 1,
    description: str = "draw",
    show_progress: bool = True,
    **call: Any,
) -> np.ndarray:
    """One clip per prompt and seed, `(clips, frames, height, width, 3)` uint8; a picture is a clip of one frame.

    The pipeline's scheduler, bar and modes come back. The noise of a clip is drawn on the CPU from its own generator.
    A clip that is not finite is an error. `call` are further arguments, as of `clip_call`.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(
            f"`seeds` must have one entry per prompt and `prompts` some, got {len(seeds)} seeds and "
            f"{len(prompts)} prompts."
        )
    pictures, clips = find_family(pipeline, "eraser").draws_pictures, []
    with quiet_run(pipeline), guided(pipeline, call):
        starts = range(0, len(prompts), batch_size)
        for start in tqdm(starts, desc=description, disable=not show_progress):
            chosen = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds[chosen]]
            given = clip_call(pipeline, prompts[chosen], seeds[chosen], call)
            frames = np.asarray(pipeline(generator=generators, output_type="np", **given)[0])
            frames = frames[:, None] if pictures else frames
            finite = np.isfinite(frames).all(axis=(1, 2, 3, 4))
            if not finite.all():
                raise ValueError(
                    "`pipeline` must draw finite clips, got NaN or infinite pixels for "
                    f"{prompts[start + int(np.argmin(finite))]!r}. Use float32 or bfloat16, or look at the adapter's "
                    "weights."
                )
            clips.append((frames.clip(0, 1) * 255).round().astype(np.uint8))
    return np.concatenate(clips)


def guided(pipeline: DiffusionPipeline, call: Mapping[str, Any]) -> AbstractContextManager[object]:
    """What a pipeline guides by besides the arguments of `clip_call`, while it is called."""
    scale = call.get("guidance_scale")
    return nullcontext() if scale is None else find_family(pipeline, "eraser").guided_call(pipeline, scale)


def clip_call(
    pipeline: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], call: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a pipeline's call for a batch of clips; those of `call` that are `None` are not given.

    `max_sequence_length` of a video model is the transformer's unless given: the pipeline's own default silently pads
    the text of smaller models. `guidance_scale` becomes what the family guides by. `first_frames` are pictures, of
    which clip of seed `s` begins with number `s` modulo their count. Prompts are not given beside their embeddings.
    """
    family, given = find_family(pipeline, "eraser"), {name: x for name, x in call.items() if x is not None}
    usual = family.text_call(pipeline)
    if family.draws_pictures:
        given.pop("num_frames", None)
    elif "max_sequence_length" in signature(type(pipeline).__call__).parameters:
        usual = {"max_sequence_length": prompt_length(pipeline), **usual}
    if "prompt_embeds" not in given:
        usual = {"prompt": list(prompts), **usual}
    if "guidance_scale" in given:
        config = getattr(pipeline, family.denoiser).config
        given |= family.guidance_arguments(config, given.pop("guidance_scale"))
    if "first_frames" in given:
        pictures = given.pop("first_frames")
        given["image"] = [pictures[int(seed) % len(pictures)] for seed in seeds]
    return {**usual, **given}


def check_clip_call(pipeline: DiffusionPipeline, call: Mapping[str, Any]) -> None:
    """Raise `ValueError` for what the call of a model's pipeline would pass over or does not know."""
    family = find_family(pipeline, "eraser")
    config, negative = getattr(pipeline, family.denoiser).config, call.get("negative_prompt")
    parameters = signature(type(pipeline).__call__).parameters
    if negative and (family.embedded_guidance(config) or "negative_prompt" not in parameters):
        raise ValueError(f"`negative_prompt` must be empty for {family.title}, which takes none, got {negative!r}.")
    if family.draws_pictures and call.get("num_frames") not in (None, 1):
        raise ValueError(f"`num_frames` must be 1 for a model that draws pictures, got {call['num_frames']}.")
    pictures, reads = call.get("first_frames"), bool(family.image_channels(config))
    if bool(pictures) != reads:
        rule = "hold pictures for an image-to-video model" if reads else "be None for a model that reads text alone"
        found = "none" if pictures is None else len(pictures)
        raise ValueError(f"`first_frames` must {rule}, got {found}.")


class Shot(NamedTuple):
    """One picture to be drawn."""

    prompt: str
    index: int  # among the pictures of this prompt
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; the arguments of a pipeline's call."""

    num_inference_steps: int = 50
    guidance_scale: float | None = 7.5
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None

    def settled_for(self, pipeline: DiffusionPipeline) -> Sampling:
        """With the usual guidance of a pipeline where none is given."""
        if self.guidance_scale is not None:
            return self
        family, config = match_family(pipeline) or Family(), denoiser_of(pipeline).config
        return replace(self, guidance_scale=family.usual_guidance(type(pipeline), config))


Draw = Callable[[Sequence[Shot]], torch.Tensor]


def image_seed(seed: int, prompt: str, index: int, stream: str = "paired") -> int:
    """Seed of picture `index` of `prompt`, 63 bits, whatever the batch and the other prompts; streams are disjoint."""
    return stream_seed(seed, stream, index, prompt)


def check_counts(**counts: int | None) -> None:
    """Raise `ValueError` for a number below 1; `None` is not given."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")


def spread_frames(count: int, frames: int | None = None) -> np.ndarray:
    """Indices of at most `frames` of `count` frames, evenly spaced, first and last among them; all when `None`."""
    return np.linspace(0, count - 1, count if frames is None else min(frames, count)).round().astype(int)


def shots_of(prompts: Sequence[str], count: int, seed: int, stream: str = "paired") -> list[Shot]:
    """`count` pictures of each prompt, prompt by prompt."""
    return [
        Shot(prompt, index, image_seed(seed, prompt, index, stream)) for prompt in prompts for index in range(count)
    ]


@torch.no_grad()
def draw(
    pipeline: DiffusionPipeline,
    shots: Sequence[Shot],
    sampling: Sampling,
    latents: torch.Tensor | None = None,
    **further: Any,
) -> torch.Tensor:
    """Pictures `(n, 3, height, width)` in [0, 1], float32 on the CPU, one generator per picture.

    The starting noise `latents`, as the pipeline's call takes it, is drawn from the shots' seeds when `None`. A
    picture that is not finite is an error.
    """
    prompts = [shot.prompt for shot in shots]
    arguments = {name: value for name, value in vars(sampling).items() if value is not None}
    family = match_family(pipeline)
    if family is not None and family.flow_matching:
        config = denoiser_of(pipeline).config
        arguments |= {**family.call_arguments, **family.text_call(pipeline)}
        arguments |= family.guidance_arguments(config, arguments.pop("guidance_scale"))
    arguments.update(further)
    negative = arguments.pop("negative_prompt", None)
    negative = negative if sampling.negative_prompt is None else sampling.negative_prompt
    if negative is not None:
        negatives = [negative] * len(shots)
        if family is None or "negative_prompt" in signature(type(pipeline).__call__).parameters:
            arguments["negative_prompt"] = negatives
        else:  # FLUX.2 klein takes it encoded
            arguments["negative_prompt_embeds"] = family.encode(pipeline, prompts, negatives).negative_prompt_embeds
    generators = [torch.Generator().manual_seed(shot.seed) for shot in shots]
    if latents is not None:
        arguments["latents"] = latents
        for generator, latent in zip(generators, latents, strict=True):
            # A sampler's later noise must not repeat the starting noise of the same seed.
            torch.randn(latent.shape, generator=generator)
    output = pipeline(prompt=prompts, generator=generators, output_type="pt", **arguments)
    pixels = output.images if hasattr(output, "images") else output.frames[:, 0]  # a clip of one frame
    pixels = pixels.float().cpu()
    broken = ~torch.isfinite(pixels).flatten(1).all(1)
    if broken.any():
        prompt = prompts[int(broken.nonzero()[0])]
        raise ValueError(
            f"{type(pipeline).__name__} must draw finite pictures, got NaN or infinite pixels for "
            f"{prompt!r}. Use float32 or bfloat16, or look at the adapter's weights."
        )
    return pixels


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Pictures `(n, 3, height, width)` in [0, 1] as PIL images."""
    levels = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(level) for level in levels]


@contextmanager
def paired_drawing(
    base: DiffusionPipeline, tuned: DiffusionPipeline | None, sampling: Sampling
) -> Iterator[tuple[Draw, Draw]]:
    """Two functions that draw the same shots with the base and with the tuned model.

    Both pipelines draw in eval mode, without progress bars and on copies of their schedulers; all of that, and the
    adapters, are back as they were on leaving, also after an exception. With `tuned=None` the adapters of `base` are
    switched off for the base side.
    """
    if tuned is None:
        check_switchable(base)
    else:
        check_comparable(base, tuned)

    def draw_base(shots: Sequence[Shot]) -> torch.Tensor:
        with adapters_disabled(base) if tuned is None else nullcontext():
            return draw(base, shots, sampling)

    with ExitStack() as restore:
        for pipeline in (base,) if tuned is None else (base, tuned):
            restore.enter_context(quiet_run(pipeline))
            restore.enter_context(eval_mode(pipeline))
        yield draw_base, lambda shots: draw(base if tuned is None else tuned, shots, sampling)


def check_comparable(base: DiffusionPipeline, tuned: DiffusionPipeline) -> None:
    """Raise `ValueError` unless two pipelines are two models under one scheduler."""
    if denoiser_of(base) is denoiser_of(tuned):
        raise ValueError(
            "`tuned` must have a denoiser of its own, got the one of `base`, whose adapters would "
            "be in both. Pass `tuned=None` to compare a pipeline with itself without its adapters."
        )
    first, second = (type(pipeline.scheduler).__name__ for pipeline in (base, tuned))
    own, other = (
        {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
        for pipeline in (base, tuned)
    )
    if first != second or own != other:
        keys = sorted(key for key in own if own[key] != other.get(key))
        raise ValueError(
            f"`tuned` must have the scheduler of `base`, got {second} for {first}"
            f"{f' with other {keys}' if keys else ''}: the drift would be the scheduler's. Use "
            "`tuned.scheduler = type(base.scheduler).from_config(base.scheduler.config)`."
        )


def adapter_layers(pipeline: DiffusionPipeline) -> list[BaseTunerLayer]:
    """The adapter layers of all of a pipeline's models that take part in its output."""
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    layers = [module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return [layer for layer in layers if layer.active_adapters and not layer.disable_adapters]


def check_switchable(pipeline: DiffusionPipeline) -> None:
    """Raise `ValueError` unless a pipeline has active adapters that can be switched off exactly."""
    layers = adapter_layers(pipeline)
    if not layers:
        raise ValueError(
            "`base` must carry an active adapter when `tuned` is None, got none. Load one "
            "(`load_lora_weights`), switch it on (`enable_lora`), or pass two pipelines."
        )
    if any(layer.merged for layer in layers):
        raise ValueError(
            "`base` must not have its adapters merged into its weights, got fused ones, which "
            "cannot be switched off exactly. Load the LoRA without `fuse_lora()`."
        )


@contextmanager
def adapters_disabled(pipeline: DiffusionPipeline) -> Iterator[None]:
    """A pipeline without its active adapters; they and their `requires_grad` come back."""
    layers = adapter_layers(pipeline)
    trainable = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    active = [layer.active_adapter for layer in layers]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer.enable_adapters(True)
            layer._active_adapter = names
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def latent_shape(
    pipeline: DiffusionPipeline, height: int | None = None, width: int | None = None
) -> tuple[int, int, int]:
    """`(channels, height, width)` of the noise of a picture of so many pixels, before any packing into tokens."""
    family = find_family(pipeline, TOOL)
    factor = family.pixels_per_latent(pipeline)
    config = denoiser_of(pipeline).config
    own = family.sample_size(config)
    sizes = (own, own) if isinstance(own, int) else tuple(own)
    rows, columns = (
        size if asked is None else asked // factor for size, asked in zip(sizes, (height, width), strict=True)
    )
    patch = family.patch(config) if family.rounds_size else 1
    return family.latent_channels(config), rows // patch * patch, columns // patch * patch


def unit_noise(shots: Sequence[Shot], shape: tuple[int, int, int]) -> torch.Tensor:
    """Noise `(n, channels, height, width)`, float32 on the CPU, each from its shot's seed alone."""
    return torch.stack([source_noise(shot.seed, shape) for shot in shots])


def draw_from_noise(
    pipeline: DiffusionPipeline, shots: Sequence[Shot], sampling: Sampling, noise: torch.Tensor
) -> torch.Tensor:
    """Pictures `(n, 3, height, width)` in [0, 1] from unit noise, which sets their size.

    Pipelines multiply `latents` by their scheduler's `init_noise_sigma` themselves.
    """
    family = find_family(pipeline, TOOL)
    latents = noise.to(pipeline._execution_device, family.latents_dtype or denoiser_of(pipeline).dtype)
    height, width = (size * family.pixels_per_latent(pipeline) for size in noise.shape[-2:])
    sampling = replace(sampling, height=height, width=width)
    return draw(pipeline, shots, sampling, family.pack(pipeline, latents), **family.call_arguments)


def pipeline_facts(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What of a pipeline, its device and the packages a report names, because its figures depend on it."""
    device = pipeline._execution_device
    return {
        "pipeline": type(pipeline).__name__,
        "base": str(pipeline.config.get("_name_or_path") or ""),
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": str(denoiser_of(pipeline).dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


@contextmanager
def without_noise_model(pipeline: DiffusionPipeline) -> Iterator[None]:
    """A golden-noise pipeline as the plain one; its network comes back."""
    network = getattr(pipeline, "noise_model", None)
    if network is None:
        yield
        return
    try:
        # By assignment diffusers would forget the component's class for good.
        vars(pipeline)["noise_model"] = None
        yield
    finally:
        vars(pipeline)["noise_model"] = network
