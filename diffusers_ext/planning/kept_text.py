"""Encoding the text of prompts once, and the files, or the memory, that trainings of golden noise keep it in."""

from __future__ import annotations

import torch

from diffusers_ext.golden_noise.text_cache import rows_of_a_file
from diffusers_ext.planning.models import ImageShapes, encode_prompts_work
from diffusers_ext.planning.tracing import safetensors_bytes
from diffusers_ext.planning.work import Precision, Work


def texts_of_a_prompt(shapes: ImageShapes) -> int:
    """How many are encoded: the negative prompts, too, of a model that is guided by a second call."""
    return 1 if shapes.embedded_guidance else 2


def kept_text_work(shapes: ImageShapes, num_prompts: int, batch_size: int, precision: Precision) -> Work:
    """Encoding so many different prompts."""
    rows = min(batch_size, num_prompts)
    return encode_prompts_work(shapes, rows, texts_of_a_prompt(shapes) * num_prompts / rows, precision)


def text_notes(shapes: ImageShapes, tokens: int | None) -> list[str]:
    """What a plan says of the length of texts: `tokens` of a prompt, where they are known."""
    if shapes.family.pads_text or tokens is not None:
        return []
    return [f"Every text is as long as the longest, {shapes.text.tokens} tokens."]


def kept_text_bytes(
    shapes: ImageShapes, num_prompts: int, dtype: torch.dtype, *, batch_size: int, tokens: int | None = None
) -> int:
    """Size of the files of so many different prompts.

    Args:
        dtype: of what is kept.
        batch_size: prompts encoded at once.
        tokens: of a prompt with its template, for a model that does not pad it; the most that it reads without.
    """
    size = rows_of_a_file(batch_size)
    whole, rest = divmod(num_prompts, size)
    files = [(whole, size), (1, rest)]
    return sum(count * safetensors_bytes(_kept(shapes, rows, dtype, tokens)) for count, rows in files if rows)


def _kept(shapes: ImageShapes, rows: int, dtype: torch.dtype, tokens: int | None) -> dict[str, torch.Tensor]:
    text, padded = shapes.text, shapes.family.pads_text
    length = text.tokens if padded or tokens is None else min(tokens, text.tokens)
    with torch.device("meta"):
        kept = {"prompt_embeds": torch.empty(rows, length, text.width, dtype=dtype)}
        if text.masked or not padded:
            kept["attention_mask"] = torch.empty(rows, length, dtype=torch.long)
        if padded and text.pooled is not None:
            kept["pooled_prompt_embeds"] = torch.empty(rows, text.pooled, dtype=dtype)
    return kept
