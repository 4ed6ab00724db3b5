"""Prompt embeddings for networks that read text: every different prompt encoded once, then kept."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_ext.golden_noise.conditioning import encode_prompts


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

    @classmethod
    @torch.no_grad()
    def encode(
        cls,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        *,
        batch_size: int = 32,
        dtype: torch.dtype = torch.float16,
    ) -> TextCache:
        """Encode each different prompt once, without its negative prompt.

        Args:
            pipeline: has the text encoders; nothing of it is changed or kept.
            prompts: may repeat.
            batch_size: prompts encoded at once.
            dtype: of the kept embeddings.

        Raises:
            ValueError: embeddings that are not finite in `dtype`.
        """
        unique = list(dict.fromkeys(prompts))
        parts: list[NetworkText] = []
        for start in tqdm(range(0, len(unique), batch_size), desc="encode prompts"):
            batch = unique[start : start + batch_size]
            encoded = encode_prompts(pipeline, batch)
            parts.append(_kept(encoded, dtype))
            if start == 0:
                size = sum(t.nbytes for t in parts[0] if t is not None) / len(batch)
                logger.info(
                    f"Embeddings of {len(unique)} prompts take {size * len(unique) / 2**30:.2f} GiB."
                )
        columns = zip(*parts)
        return cls(unique, NetworkText(*(None if c[0] is None else torch.cat(c) for c in columns)))

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
