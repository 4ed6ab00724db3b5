"""Which token of one prompt stands where which of another does, in the text that a denoiser reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.families import Family, match_family


def aligned(target_ids: Sequence[int], anchor_ids: Sequence[int], length: int) -> torch.Tensor:
    """Position in the anchor's prompt for each of the `length` positions of the target's.

    What both prompts begin and end with stands where it stands; between, the last tokens go together, because a causal
    encoder gathers a phrase in its last token, and surplus tokens of the target get the first of the anchor's. Padding
    follows the end.

    Args:
        target_ids, anchor_ids: without padding.
    """
    shorter = min(len(target_ids), len(anchor_ids))
    prefix = next((i for i in range(shorter) if target_ids[i] != anchor_ids[i]), shorter)
    most = shorter - prefix
    suffix = next((i for i in range(most) if target_ids[-1 - i] != anchor_ids[-1 - i]), most)
    positions = torch.arange(length)
    shift = len(anchor_ids) - len(target_ids)
    inside = (positions >= prefix) & (positions < len(target_ids) - suffix)
    moved = positions + shift
    moved[inside] = moved[inside].clamp_min(min(prefix, len(anchor_ids) - 1))
    moved[positions < prefix] = positions[positions < prefix]
    return moved.clamp(0, length - 1)


def token_alignment(
    pipeline: DiffusionPipeline, targets: Sequence[str], anchors: Sequence[str], length: int
) -> torch.Tensor:
    """`aligned` for pairs of prompts over all tokens of a text, `(prompts, length)`.

    The tokens of several encoders may follow each other, as the family says.

    Raises:
        ValueError: prompts of different lengths, in a text whose tokens no tokenizer of the pipeline tells.
    """
    if length == 1:  # pooled
        return torch.zeros(len(targets), 1, dtype=torch.long)
    family = match_family(pipeline) or Family()
    targets_ids, anchors_ids = ([family.token_ids(pipeline, p) for p in prompts] for prompts in (targets, anchors))
    pairs = [list(zip(*encoder)) for encoder in zip(zip(*targets_ids), zip(*anchors_ids))]
    if all(len(a) == len(b) for pair in pairs for a, b in pair):
        return torch.arange(length).expand(len(targets), length)
    names = [name.replace("text_encoder", "tokenizer") for name in family.token_encoders[:-1]]
    lengths = [min(getattr(pipeline, name).model_max_length, length) for name in names]
    lengths.append(length - sum(lengths))
    if lengths[-1] < max(len(ids) for pair in pairs[-1] for ids in pair):
        raise ValueError(
            f"`anchor` must have as many tokens as `target` for {type(pipeline).__name__}, whose text of {length} "
            f"tokens is not that of its tokenizers, got {anchors[0]!r} for {targets[0]!r}."
        )
    rows, first = [], 0
    for pair, part in zip(pairs, lengths):
        rows.append(torch.stack([aligned(a, b, part) for a, b in pair]) + first)
        first += part
    return torch.cat(rows, dim=1)
