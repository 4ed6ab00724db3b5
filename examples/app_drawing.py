"""What the app draws: a prompt and a seed, once plainly and once with a tool."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import CogVideoXPipeline, DiffusionPipeline
from PIL import Image

from diffusers_ext import load_eraser, render_clips
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.evaluation.report_files import write_clip
from examples.app_artifacts import find_or_make
from examples.app_messages import CannotDraw
from examples.app_reading import read_clip, read_picture
from examples.app_texts import ERASER, NOISE, SUBJECT
from examples.arguments import DEVICE, DTYPE
from examples.digits.check_model import MODEL_DIR as IMAGE_MODEL
from examples.golden_noise_in_sdxl import PIPELINES
from examples.moving_digits.check_model import MODEL_DIR as VIDEO_MODEL

LARGEST_STRENGTH, LARGEST_SEED = 2.0, 2**32 - 1
_SMALLEST_SIDE = 320  # pixels; smaller pictures are enlarged by whole factors
_FILES_KEPT = 20  # the page has copies of what it shows


@dataclass(frozen=True)
class Sources:
    """Where models and artifacts come from.

    Attributes:
        image_model, video_model: folders or Hub names; the bundled models when `None`.
        lora, noise_model, eraser: the same; made for the bundled models when `None`.
        output_dir: of what is made.
        num_inference_steps: of all drawing; what suits the bundled models, the pipeline's own number for others when
            `None`.
    """

    image_model: str | None = None
    video_model: str | None = None
    lora: str | None = None
    noise_model: str | None = None
    eraser: str | None = None
    output_dir: str = "outputs/app"
    num_inference_steps: int | None = None

    def sampling(self, model: str | None, steps: int, guidance_scale: float) -> dict[str, Any]:
        """Arguments of a pipeline's call; the two numbers are for the bundled model."""
        run = {} if model else {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        if self.num_inference_steps is not None:
            run["num_inference_steps"] = self.num_inference_steps
        return run

    def locate(self, name: str) -> str | Path:
        """Folder or Hub name of an artifact, which is made where it must be."""
        return getattr(self, name) or find_or_make(name, self.output_dir)


class Drawn(NamedTuple):
    """One side of a comparison."""

    path: str  # of a picture or a moving gif
    reading: str  # what a judge sees; empty for models that it does not know


class SideBySide:
    """Draws with the models of `sources`, which are loaded when they are first needed."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.count = 0
        self.plain: dict[tuple[Any, ...], Drawn] = {}

    @property
    def tools(self) -> dict[str, Callable[[str, int, float], tuple[Drawn, Drawn]]]:
        """What can be shown: tools whose artifact is given or can be made for the bundled model."""
        sources = self.sources
        tools = {
            SUBJECT: (self._draw_subject, sources.lora, sources.image_model),
            NOISE: (self._draw_golden_noise, sources.noise_model, sources.image_model),
            ERASER: (self._draw_erased, sources.eraser, sources.video_model),
        }
        return {name: draw for name, (draw, artifact, model) in tools.items() if artifact is not None or model is None}

    def draw(self, tool: str, prompt: str, seed: int, strength: float) -> tuple[Drawn, Drawn]:
        """The plain result and the one with the tool, of the same seed.

        Args:
            tool: one of `tools`.
            prompt: what to draw.
            seed: of the noise.
            strength: of the tool; 0 is without it, 1 as it was trained.

        Raises:
            CannotDraw: an unknown tool, no prompt, or a number out of range.
        """
        if tool not in self.tools:
            raise CannotDraw(f"Choose one of these tools: {', '.join(self.tools)}; not {tool!r}.")
        if not isinstance(prompt, str) or not prompt.strip():
            raise CannotDraw("The prompt is empty. Write what to draw.")
        if not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
            shown = "an empty field" if seed is None else seed
            raise CannotDraw(f"The seed must be a whole number from 0 to {LARGEST_SEED}, not {shown}.")
        if not (math.isfinite(strength) and 0 <= strength <= LARGEST_STRENGTH):
            raise CannotDraw(f"The strength must be from 0 to {LARGEST_STRENGTH:g}, not {strength}.")
        return self.tools[tool](prompt.strip(), seed, strength)

    def artifact_of(self, tool: str) -> str | None:
        """Folder or Hub name of a tool's LoRA, network or eraser, where one was given."""
        names = {SUBJECT: "lora", NOISE: "noise_model", ERASER: "eraser"}
        return getattr(self.sources, names[tool]) if tool in names else None

    @cached_property
    def folder(self) -> Path:
        """Of what was drawn; goes with this object."""
        folder = Path(tempfile.mkdtemp(prefix="diffusers_ext_app_"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    @cached_property
    def image_pipeline(self) -> DiffusionPipeline:
        """Draws pictures; its LoRA is off and its network at rest unless they are shown."""
        source = self.sources.image_model or IMAGE_MODEL
        plain = DiffusionPipeline.load_config(source)["_class_name"]
        if plain not in PIPELINES:
            raise ValueError(f"The image model must be a pipeline of {list(PIPELINES)}, got a {plain}.")
        return PIPELINES[plain].from_pretrained(source, dtype=DTYPE).to(DEVICE)

    @cached_property
    def video_pipeline(self) -> CogVideoXPipeline:
        """Draws clips; with the eraser."""
        eraser = self.sources.locate("eraser")
        source = self.sources.video_model or VIDEO_MODEL
        pipeline = CogVideoXPipeline.from_pretrained(source, dtype=DTYPE).to(DEVICE)
        load_eraser(pipeline, eraser, adapter_name="eraser", scale=0.0)
        return pipeline

    @cached_property
    def _subject(self) -> DiffusionPipeline:
        """The image pipeline with the LoRA in it, which is off unless it is shown."""
        pipeline, lora = self.image_pipeline, self.sources.locate("lora")
        try:
            pipeline.load_lora_weights(lora, adapter_name="subject")
        except BaseException:
            pipeline.unload_lora_weights()  # the other tools get the plain weights
            raise
        pipeline.disable_lora()
        return pipeline

    def _draw_subject(self, prompt: str, seed: int, strength: float) -> tuple[Drawn, Drawn]:
        pipeline = self._subject
        run = self.sources.sampling(self.sources.image_model, 20, 3.0)
        run["golden_noise_scale"] = 0.0
        plain = self._plain(self._picture, prompt, seed, **run)
        try:
            pipeline.enable_lora()
            pipeline.set_adapters("subject", strength)
            drawn = self._picture(prompt, seed, **run)
        finally:
            pipeline.disable_lora()
        return plain, drawn

    def _draw_golden_noise(self, prompt: str, seed: int, strength: float) -> tuple[Drawn, Drawn]:
        pipeline = self.image_pipeline
        if pipeline.noise_model is None:
            pipeline.load_noise_model(self.sources.locate("noise_model"))
        # With many steps every digit is right anyway.
        run = self.sources.sampling(self.sources.image_model, 4, 1.5)
        plain = self._plain(self._picture, prompt, seed, golden_noise_scale=0.0, **run)
        return plain, self._picture(prompt, seed, golden_noise_scale=strength, **run)

    def _draw_erased(self, prompt: str, seed: int, strength: float) -> tuple[Drawn, Drawn]:
        run = self.sources.sampling(self.sources.video_model, 20, 3.0)
        plain = self._plain(self._clip, prompt, seed, scale=0.0, **run)
        return plain, self._clip(prompt, seed, scale=strength, **run)

    def _plain(self, draw: Callable[..., Drawn], prompt: str, seed: int, **run: Any) -> Drawn:
        """The result without a tool: drawn once for a prompt, a seed and settings, then kept."""
        key = (draw.__name__, prompt, seed, *sorted(run.items()))
        kept = self.plain.get(key)
        if kept is None or not Path(kept.path).is_file():
            self.plain = {k: v for k, v in self.plain.items() if Path(v.path).is_file()}
            kept = self.plain[key] = draw(prompt, seed, **run)
        return kept

    def _clip(self, prompt: str, seed: int, scale: float, **run: Any) -> Drawn:
        pipeline = self.video_pipeline
        try:
            pipeline.transformer.set_adapters("eraser", scale)
            [clip] = render_clips(pipeline, [prompt], seeds=[seed], **run)
        finally:
            pipeline.transformer.set_adapters("eraser", 0.0)
        reading = read_clip(clip) if self.sources.video_model is None else ""
        factor = max(1, -(-_SMALLEST_SIDE // max(clip.shape[1:3])))
        path = self._next_file("gif")
        write_clip(clip.repeat(factor, axis=1).repeat(factor, axis=2), path)
        return Drawn(str(path), reading)

    def _picture(self, prompt: str, seed: int, **run: Any) -> Drawn:
        generator = torch.Generator().manual_seed(seed)
        with quiet_run(self.image_pipeline):
            [image] = self.image_pipeline(prompt, generator=generator, **run).images
        factor = max(1, -(-_SMALLEST_SIDE // max(image.size)))
        size = image.width * factor, image.height * factor
        path = self._next_file("png")
        image.resize(size, Image.Resampling.NEAREST).save(path)
        return Drawn(str(path), read_picture(image) if self.sources.image_model is None else "")

    def _next_file(self, suffix: str) -> Path:
        self.count += 1
        for old in self.folder.glob(f"{self.count - _FILES_KEPT:06d}.*"):
            old.unlink()
        return self.folder / f"{self.count:06d}.{suffix}"
