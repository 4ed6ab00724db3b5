"""Prompt embeddings for networks that read text: every different prompt encoded once, then kept."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_ext.families import find_family
from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.redenoise import TOOL, encode_prompts

logger = logging.getLogger(__name__)

CACHE_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
# What networks are told of a prompt.
_READ = ("prompt_embeds", "attention_mask", "pooled_prompt_embeds")


class TextCache:
    """Embeddings `text` of different prompts on the CPU, and in `rows` which is whose."""

    def __init__(self, prompts: Sequence[str], text: TextConditioning) -> None:
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
        """Encode each different prompt once, without its negative prompt; `ValueError` if not finite in `dtype`.

        With a `directory` they are kept in memory-mapped files there, which go with the cache. (100,000 prompts of
        SDXL take 30 GiB in float16.)
        """
        unique, padded = list(dict.fromkeys(prompts)), find_family(pipeline, TOOL).pads_text
        if not padded:  # room for the longest is made at once, mostly
            unique.sort(key=len, reverse=True)
        scratch = None
        if directory is not None:
            os.makedirs(directory, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(prefix="text-", dir=directory)
        whole: dict[str, torch.Tensor] = {}
        for start in tqdm(range(0, len(unique), batch_size), desc="encode prompts"):
            batch = unique[start : start + batch_size]
            text = encode_prompts(pipeline, batch)
            part = _kept(text if padded else _trimmed(text), dtype)
            if start == 0:
                whole = {name: _allocate(rows, len(unique), scratch, name) for name, rows in part.items()}
                size = sum(tensor.nbytes for tensor in whole.values())
                logger.info(f"Embeddings of {len(unique)} prompts take {size / 2**30:.2f} GiB.")
            for name, rows in part.items():
                if rows.shape[1] > whole[name].shape[1]:
                    larger = _allocate(rows, len(unique), scratch, f"{name}-{start}")
                    larger[:start, : whole[name].shape[1]] = whole[name][:start]
                    whole[name] = larger
                whole[name][start : start + len(batch), : rows.shape[1]] = rows
        cache = cls(unique, TextConditioning(**whole))
        cache._scratch = scratch  # its files live as long as the cache
        return cache

    def take(self, rows: torch.Tensor, device: torch.device) -> TextConditioning:
        """The text of some rows in float32, the mask as it is, on `device`."""
        return self.text[rows].to(device, torch.float32)

    @property
    def facts(self) -> dict[str, Any]:
        """Widths, and sums that tell one text encoder from another; JSON-able."""
        embeds, pooled = self.text.prompt_embeds, self.text.pooled_prompt_embeds
        return {
            "tokens": embeds.shape[1],
            "text_embed_dim": embeds.shape[2],
            "pooled_dim": None if pooled is None else pooled.shape[1],
            # As many digits as do not depend on the number of threads.
            "probe": f"{embeds[0].float().norm().item():.3g}",
        }


def _allocate(part: torch.Tensor, rows: int, scratch: tempfile.TemporaryDirectory | None, name: str) -> torch.Tensor:
    shape = (rows, *part.shape[1:])
    if scratch is None:
        return torch.zeros(shape, dtype=part.dtype)
    path, size = os.path.join(scratch.name, name), torch.Size(shape).numel()
    return torch.from_file(path, shared=True, size=size, dtype=part.dtype).view(shape)


def _trimmed(text: TextConditioning) -> TextConditioning:
    """Without the padding that all of its prompts have."""
    length = int(text.attention_mask.sum(1).max())
    return TextConditioning(text.prompt_embeds[:, :length], attention_mask=text.attention_mask[:, :length])


def _kept(encoded: TextConditioning, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = {name: tensor for name, tensor in encoded.tensors().items() if name in _READ}
    kept = TextConditioning(**tensors).to("cpu", dtype).tensors()
    if not all(tensor.isfinite().all() for tensor in kept.values()):
        raise ValueError(
            f"Prompt embeddings must be finite in {dtype}, got some that are not. Use "
            "`--text_cache_dtype fp32`, or check the text encoder."
        )
    return kept
