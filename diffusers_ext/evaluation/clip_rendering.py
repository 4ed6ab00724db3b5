"""Draw clips so that each depends on its prompt and seed alone, whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_ext.core.quiet_run import quiet_run


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
    """One clip per prompt, `(clips, frames, height, width, 3)` uint8.

    Args:
        pipeline: a CogVideoX pipeline, with or without adapters; its scheduler, bar and modes come back.
        seeds: one per prompt; the noise of a clip is drawn on the CPU from its own generator.
        call: further arguments of the pipeline's call: `num_frames`, `height`, `width`, `guidance_scale`,
            `num_inference_steps`, `attention_kwargs`, ... `max_sequence_length` is the transformer's unless
            given: the pipeline's own default silently pads the text of smaller models.

    Raises:
        ValueError: not one seed per prompt, no prompt, or a clip that is not finite.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(
            f"`seeds` must have one entry per prompt and `prompts` some, got {len(seeds)} seeds and "
            f"{len(prompts)} prompts."
        )
    call = {"max_sequence_length": pipeline.transformer.config.max_text_seq_length, **call}
    clips = []
    with quiet_run(pipeline):
        starts = range(0, len(prompts), batch_size)
        for start in tqdm(starts, desc=description, disable=not show_progress):
            chosen = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds[chosen]]
            frames = pipeline(
                list(prompts[chosen]), generator=generators, output_type="np", **call
            ).frames
            clips.append(_to_bytes(np.asarray(frames), prompts[chosen]))
    return np.concatenate(clips)


def _to_bytes(frames: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    finite = np.isfinite(frames).all(axis=(1, 2, 3, 4))
    if not finite.all():
        raise ValueError(
            "`pipeline` must draw finite clips, got NaN or infinite pixels for "
            f"{prompts[int(np.argmin(finite))]!r}. Use float32 or bfloat16, or look at the adapter's "
            "weights."
        )
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)
