"""Clips of validation prompts during an eraser's training, with and without the eraser."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline

from diffusers_ext.core.quiet_run import quiet_run
from diffusers_ext.eraser.outputs import erasers_disabled
from diffusers_ext.eraser.recipe import EraserSettings
from diffusers_ext.evaluation.clip_sheet import write_clip
from training.eraser_data import ClipSize
from training.eraser_text import RunText


logger = get_logger(__name__)

_GAP = 2  # white pixels between the two clips


class ClipValidation:
    """Draws `--validation_prompt` at fixed seeds every `--validation_steps` and at the end.

    Each file shows the base model on the left and the eraser at full strength on the right, from the
    same noise. The text encoder is gone by then, so prompts come as embeddings.

    Args:
        args: of the script.
        pipeline: with the transformer that trains.
        accelerator: of the run; the main process draws.
        text: of the run, with the validation prompts.
        size: of the clips.

    Attributes:
        files: clips of the last call.
    """

    def __init__(
        self,
        args: EraserSettings,
        pipeline: DiffusionPipeline,
        accelerator: Accelerator,
        text: RunText,
        size: ClipSize,
    ) -> None:
        self.args, self.pipeline, self.accelerator = args, pipeline, accelerator
        self.prompt_embeds, self.size = text.validation, size
        self.empty_embed = text.embeds.empty
        self.files: list[Path] = []
        self._base: dict[tuple[int, int], np.ndarray] = {}

    def callbacks(self) -> list[tuple[int, Callable[[int], None]]]:
        """What `TrainingLoop` calls; empty without validation prompts."""
        if not self.args.validation_prompt:
            return []
        return [(self.args.validation_steps or self.args.max_train_steps, self.draw)]

    def draw(self, step: int) -> None:
        """Draw and save the clips of one step; the models' modes and the VAE's place come back."""
        if not self.accelerator.is_main_process:
            return
        folder = Path(self.args.output_dir, "validation")
        folder.mkdir(parents=True, exist_ok=True)
        self.files, vae = [], self.pipeline.vae
        home = vae.device
        with ExitStack() as restore:
            restore.callback(vae.to, home)
            vae.to(self.accelerator.device)
            restore.enter_context(quiet_run(self.pipeline))
            for prompt in range(len(self.args.validation_prompt)):
                for video in range(self.args.num_validation_videos):
                    name = f"step-{step:06d}-prompt-{prompt}-video-{video}.gif"
                    self._save(folder / name, self._side_by_side(prompt, video))
        logger.info(f"Drew {len(self.files)} validation clips at step {step}.")

    def _side_by_side(self, prompt: int, video: int) -> np.ndarray:
        """`(frames, height, 2 width and a gap, 3)` uint8: base and erased."""
        key = (prompt, video)
        if key not in self._base:
            with erasers_disabled(self.pipeline.transformer):
                self._base[key] = self._clip(prompt, video)
        base = self._base[key]
        gap = np.full((*base.shape[:2], _GAP, 3), 255, np.uint8)
        return np.concatenate([base, gap, self._clip(prompt, video)], 2)

    @torch.no_grad()
    def _clip(self, prompt: int, video: int) -> np.ndarray:
        device, dtype = self.accelerator.device, self.pipeline.transformer.dtype
        frames = self.pipeline(
            prompt_embeds=self.prompt_embeds[prompt][None].to(device, dtype),
            negative_prompt_embeds=self.empty_embed[None].to(device, dtype),
            generator=torch.Generator().manual_seed(self.args.seed + video),
            num_frames=self.size.num_frames,
            height=self.size.height,
            width=self.size.width,
            num_inference_steps=self.args.num_inference_steps,
            guidance_scale=self.args.sampling_guidance_scale,
            max_sequence_length=self.prompt_embeds.shape[1],
            output_type="np",
        ).frames[0]
        return (np.asarray(frames).clip(0, 1) * 255).round().astype(np.uint8)

    def _save(self, path: Path, frames: np.ndarray) -> None:
        write_clip(frames, path, fps=self.args.validation_fps)
        self.files.append(path)
