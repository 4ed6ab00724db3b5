"""Prompt embeddings of CogVideoX from tokenizer and text encoder alone, so that the rest need not be loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffusers_ext.core.restored_state import module_eval_mode
from diffusers_ext.families.registry import find_family

logger = logging.getLogger(__name__)


def prompt_length(pipeline: DiffusionPipeline) -> int:
    """Tokens that the prompts of a video pipeline are padded to."""
    return find_family(pipeline, "eraser").text_length(pipeline.transformer.config)


@torch.no_grad()
def encode_video_prompts(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    prompts: Sequence[str],
    max_sequence_length: int,
    *,
    batch_size: int = 8,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """What `CogVideoXPipeline` hands to its transformer: padded to full length, padding not masked.

    Args:
        tokenizer, text_encoder: of the pipeline; the latter runs in eval mode and keeps its own.
        prompts: `""` is the unconditional one; repeated prompts are encoded once.
        max_sequence_length: tokens of a padded prompt, the transformer's `max_text_seq_length`.
        batch_size: prompts encoded at once.
        device: where the token ids go; the text encoder's own when `None`.

    Returns:
        `(prompts, max_sequence_length, dim)` on the CPU, of the text encoder's dtype.

    Raises:
        ValueError: no prompt, or embeddings that are not finite.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"`prompts` must be a list of at least one prompt, got {prompts!r}.")
    device = text_encoder.device if device is None else device
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    unique = list(rows)
    _warn_of_cut_prompts(tokenizer, unique, max_sequence_length)
    encoded = []
    with module_eval_mode(text_encoder):
        for start in tqdm(range(0, len(unique), batch_size), desc="encode prompts"):
            input_ids = tokenizer(
                unique[start : start + batch_size],
                padding="max_length",
                max_length=max_sequence_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            encoded.append(text_encoder(input_ids.to(device))[0].cpu())
    embeds = torch.cat(encoded)
    if not embeds.isfinite().all():
        raise ValueError(
            f"`text_encoder` must give finite embeddings, got others in {embeds.dtype}. Load it in "
            "bfloat16 or float32."
        )
    if len(unique) == len(prompts):
        return embeds
    return embeds[torch.tensor([rows[prompt] for prompt in prompts])]


def encode_for(pipeline: Any, prompts: Sequence[str], batch_size: int = 8) -> torch.Tensor:
    """`encode_video_prompts` with the components of a pipeline, at its transformer's length."""
    length = prompt_length(pipeline)
    encoder = (pipeline.tokenizer, pipeline.text_encoder)
    return encode_video_prompts(*encoder, prompts, length, batch_size=batch_size)


def _warn_of_cut_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_sequence_length: int) -> None:
    ids = tokenizer(list(prompts), truncation=False).input_ids
    cut = [p for p, row in zip(prompts, ids, strict=True) if len(row) > max_sequence_length]
    if cut:
        logger.warning(f"{len(cut)} prompts are cut at {max_sequence_length} tokens, the first is {cut[0]!r}.")
