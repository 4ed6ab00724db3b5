"""Normalized attention guidance (Chen et al. 2025, arXiv 2505.21179): a negative prompt inside of attention.

Attention to the prompt gives Z+, to the negative prompt from the same queries Z-, `scale` is 1 + phi:

    Z~ = Z+ + phi (Z+ - Z-)
    Z^ = min(|Z~|_1 / |Z+|_1, tau) / (|Z~|_1 / |Z+|_1) Z~
    Z  = alpha Z^ + (1 - alpha) Z+

before the output projection, where |.|_1 is of a token. In cross-attention that is all; in joint attention the
prompts' own tokens go on apart and the video's are shared, which comes about by itself: rows of both prompts see equal
video tokens because each layer gives them equal ones. The defaults are those that are published for Wan.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline

from benchmarks.baselines.guarded_calls import GuardedCalls


def normalized_guidance(
    positive: torch.Tensor, negative: torch.Tensor, scale: float, tau: float, alpha: float
) -> torch.Tensor:
    """`Z` of the module's equations, from `(..., tokens, width)`."""
    extrapolated = scale * positive - (scale - 1) * negative
    ratio = extrapolated.norm(p=1, dim=-1, keepdim=True) / positive.norm(p=1, dim=-1, keepdim=True).clamp(min=1e-7)
    normalized = extrapolated * (ratio.clamp(max=tau) / ratio.clamp(min=1e-7))
    return alpha * normalized + (1 - alpha) * positive


def text_attentions(denoiser: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The attentions that read text: cross-attention (`attn2`), joint attention (`attn1`) where there is none."""
    for end in ("attn2", "attn1"):
        if found := {name: module for name, module in denoiser.named_modules() if name.split(".")[-1] == end}:
            return found
    raise ValueError(f"`denoiser` must have attentions named attn1 or attn2, got {type(denoiser).__name__} without.")


class NormalizedAttentionGuidance(GuardedCalls):
    """NAG on a video pipeline, beside whatever guidance its call has."""

    def __init__(
        self, pipeline: DiffusionPipeline, concept: str, *, scale: float = 11.0, tau: float = 2.5, alpha: float = 0.25,
        **sizes: int,
    ) -> None:  # fmt: skip
        super().__init__(pipeline, concept, **sizes)
        self.dials = (scale, tau, alpha)

    def further(self) -> list[torch.Tensor]:
        """The negative prompt."""
        return [self.of_concept]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Also the input of each output projection."""
        attentions = text_attentions(self.pipeline.transformer)
        hooks = []
        try:
            for name, attention in attentions.items():
                first = name.endswith("attn1")  # text comes before the video
                hook = attention.to_out[0].register_forward_pre_hook(self._guide_joint if first else self._guide)
                hooks.append(hook)
            with super().active():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _guide(self, _: Any, args: tuple[torch.Tensor, ...], skipped: int = 0) -> tuple[torch.Tensor, ...]:
        if not len(self.rows):
            return args
        attended = args[0].clone()
        video = attended[:, skipped:]
        guided = normalized_guidance(video[self.rows], video[self.num_rows :], *self.dials)
        attended[self.rows, skipped:] = guided
        attended[self.num_rows :, skipped:] = guided
        return (attended, *args[1:])

    def _guide_joint(self, module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return self._guide(module, args, self.text_length)
