"""VideoEraser (Xu et al. 2025, arXiv 2508.15314): a prompt without its trigger tokens, and guidance off the concept.

Selective prompt embedding adjustment is SAFREE's filter in the first quarter of a run (steps 0 to 12 of 50).
Adversarial-resilient noise guidance takes the concept's own direction out of the prompt's, element by element,

    s_t = min(strength |v_p - v_c|, 1) where v_p - v_c < threshold, else 0
    g_t = s_t (v_c - v_u) + momentum_scale m_t,   m_{t+1} = beta m_t + (1 - beta) g_t
    v'  = v_p - g_t

with the numbers of the published code for CogVideoX. `v_u` is of the empty prompt; in that code the negative prompt is
the concept itself, where the whole term is all but zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

from benchmarks.baselines.safree import Safree

_ADJUSTED = 13 / 50  # of a run's steps


def concept_scale(told: torch.Tensor, concept: torch.Tensor, strength: float, threshold: float) -> torch.Tensor:
    """`s_t` of the module's equations."""
    apart = told - concept
    scale = (strength * apart.abs()).clamp(max=1.0)
    return torch.where(apart < threshold, scale, torch.zeros_like(scale))


class VideoEraser(Safree):
    """VideoEraser on a video pipeline."""

    def __init__(
        self, pipeline: DiffusionPipeline, concept: str, *, strength: float = 5000.0, threshold: float = 1.0,
        momentum_scale: float = 0.5, beta: float = 0.7, **sizes: int,
    ) -> None:  # fmt: skip
        super().__init__(pipeline, concept, **sizes)
        self.strength, self.threshold = strength, threshold
        self.momentum_scale, self.beta = momentum_scale, beta
        self._momentum: torch.Tensor | None = None

    def share_of_run(self, tokens: torch.Tensor, replaced: torch.Tensor) -> float:
        """The same for all prompts."""
        return _ADJUSTED

    def further(self) -> list[torch.Tensor]:
        """Of the concept and of nothing."""
        return [self.of_concept, self.empty]

    def answer(self, told: torch.Tensor, others: Sequence[torch.Tensor], steps: torch.Tensor) -> torch.Tensor:
        """The momentum is of a run; outside of one, where rows are at different steps, there is none."""
        concept, without = others
        guided = concept_scale(told, concept, self.strength, self.threshold) * (concept - without)
        in_a_run = len(steps.unique()) == 1 and not torch.is_grad_enabled()
        before = self._momentum
        if not in_a_run or before is None or before.shape != guided.shape or not steps.any():
            before = torch.zeros_like(guided)
        guided = guided + self.momentum_scale * before
        self._momentum = (self.beta * before + (1 - self.beta) * guided).detach() if in_a_run else None
        return told - guided
