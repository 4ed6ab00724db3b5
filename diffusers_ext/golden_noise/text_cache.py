"""Prompt embeddings for networks that read text: every different prompt encoded once, then kept."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_ext.golden_noise.redenoise import encode_prompts

logger = logging.getLogger(__name__)

CACHE_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


class NetworkText(NamedTuple):
    """What a golden-noise network is told of some prompts."""

    prompt_embeds: torch.Tensor  # (batch, tokens, dim)
    attention_mask: torch.Tensor | None  # (batch, tokens), nonzero where a token is read
    pooled_prompt_embeds: torch.Tensor | None  # (batch, pooled_dim)


class TextCache:
    """Embeddings of different prompts on the CPU.

    Attributes:
        rows: the row of each prompt.
        text: embeddings of all prompts, in order of `rows`.
    """

    def __init__(self, prompts: Sequence[str], text: NetworkText) -> None:
        self.rows = {prompt: row for row, prompt in enumerate(prompts)}
        self.text = text
        self._scratch: tempfile.TemporaryDirectory | None = None

    @classmethod
    @torch.no_grad()
    def encode(
        cls,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        *,
        batch_size: int = 32,
        dtype: torch.dtype = torch.float16,
        directory: str | os.PathLike | None = None,
    ) -> TextCache:
        """Encode each different prompt once, without its negative prompt.

        Args:
            pipeline: has the text encoders; nothing of it is changed or kept.
            prompts: may repeat.
            batch_size: prompts encoded at once.
            dtype: of the kept embeddings.
            directory: keeps them in memory-mapped files there, which go with the cache; in memory when `None`.
                (100,000 prompts of SDXL take 30 GiB in float16.)

        Raises:
            ValueError: embeddings that are not finite in `dtype`.
        """
        unique = list(dict.fromkeys(prompts))
        scratch = None
        if directory is not None:
            os.makedirs(directory, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(prefix="text-", dir=directory)
        kept: list[torch.Tensor | None] = []
        for start in tqdm(range(0, len(unique), batch_size), desc="encode prompts"):
            batch = unique[start : start + batch_size]
            part = _kept(encode_prompts(pipeline, batch), dtype)
            if start == 0:
                kept = [_allocate(t, len(unique), scratch, f"{i}") for i, t in enumerate(part)]
                size = sum(t.nbytes for t in kept if t is not None)
                logger.info(f"Embeddings of {len(unique)} prompts take {size / 2**30:.2f} GiB.")
            for whole, rows in zip(kept, part, strict=True):
                if whole is not None:
                    whole[start : start + len(batch)] = rows
        cache = cls(unique, NetworkText(*kept))
        cache._scratch = scratch  # its files live as long as the cache
        return cache

    def take(self, rows: torch.Tensor, device: torch.device) -> NetworkText:
        """The text of some rows in float32, the mask as it is, on `device`."""
        embeds, mask, pooled = self.text
        return NetworkText(
            embeds[rows].to(device, torch.float32),
            None if mask is None else mask[rows].to(device),
            None if pooled is None else pooled[rows].to(device, torch.float32),
        )

    @property
    def facts(self) -> dict[str, Any]:
        """Widths, and sums that tell one text encoder from another; JSON-able."""
        embeds, _, pooled = self.text
        return {
            "tokens": embeds.shape[1],
            "text_embed_dim": embeds.shape[2],
            "pooled_dim": None if pooled is None else pooled.shape[1],
            # As many digits as do not depend on the number of threads.
            "probe": f"{embeds[0].float().norm().item():.3g}",
        }


def _allocate(
    part: torch.Tensor | None, rows: int, scratch: tempfile.TemporaryDirectory | None, name: str
) -> torch.Tensor | None:
    """Room for `rows` rows like those of `part`, in memory or in a file."""
    if part is None:
        return None
    shape = (rows, *part.shape[1:])
    if scratch is None:
        return torch.empty(shape, dtype=part.dtype)
    path, size = os.path.join(scratch.name, name), torch.Size(shape).numel()
    return torch.from_file(path, shared=True, size=size, dtype=part.dtype).view(shape)


def _kept(encoded: Any, dtype: torch.dtype) -> NetworkText:
    """The conditional part of encoded prompts, on the CPU."""
    embeds = encoded.prompt_embeds.to("cpu", dtype)
    pooled = encoded.pooled_prompt_embeds
    pooled = None if pooled is None else pooled.to("cpu", dtype)
    if not all(t.isfinite().all() for t in (embeds, pooled) if t is not None):
        raise ValueError(
            f"Prompt embeddings must be finite in {dtype}, got some that are not. Use "
            "`--text_cache_dtype fp32`, or check the text encoder."
        )
    mask = encoded.attention_mask
    return NetworkText(embeds, None if mask is None else mask.to("cpu"), pooled)
