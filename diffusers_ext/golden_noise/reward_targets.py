"""Golden noise that a reward asks for, where there is no guidance to take it from: distilled models and few steps.

Two targets, and the loss of a network that is trained by the reward itself.

- `ascend_reward`: gradient ascent on the noise, `x <- match(x + a sqrt(d) g / |g|)` with `g` the gradient of
  `r(G(x), prompt)` through the sampler G (ReNO, arXiv:2406.04312, there with a penalty that keeps the norm likely).
  `match` puts the energy of every ring of frequency back, so that norm and spectrum stay those of the seed's noise.
- `best_neighbour`: of N noises `sqrt(1 - s^2) x + s z` the one whose picture the reward likes best, for rewards
  without a gradient. With s = 1 they are other seeds, and all that a network can learn of the choice is its mean for
  the prompt, `E[z | prompt, z is best]`; with s < 1 also how it depends on x.
- `RewardLoss`: `-r(G(x + f(x, prompt))) + lambda / 2 mean f^2` of a network's change f, where the second term stands
  for the Kullback-Leibler distance of the changed noise from the standard normal (Noise Hypernetworks,
  arXiv:2508.09968). The gradient of r is brought to unit length sample by sample, as in the ascent: a picture that is
  nearly right counts as much as one that is wrong, no scale of a reward matters, and the best change is the expected
  direction over lambda: of length `c / lambda` where the network predicts it with cosine c.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from diffusers_ext.core.seeds import draw_rows
from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.losses import pair_inputs
from diffusers_ext.golden_noise.noise_statistics import match_spectrum
from diffusers_ext.golden_noise.text_cache import TextCache

Score = Callable[[torch.Tensor], torch.Tensor]  # of noises `(batch, channels, height, width)`: `(batch,)`


def ascend_reward(noise: torch.Tensor, score: Score, *, steps: int, rate: float) -> torch.Tensor:
    """The best noise on the way of `steps` steps up the reward's gradient, each `rate` of the noise's deviation long.

    Args:
        noise: `(batch, channels, height, width)`, unit variance, float32.
        score: differentiable; a sample's score must depend on its own noise alone.
    """
    _check_positive(steps=steps, rate=rate)
    x, best = noise, noise
    highest = noise.new_full((len(noise),), -math.inf)
    for step in range(steps + 1):
        x = x.detach().requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            scores = score(x)
            total = scores.sum()
        scores = scores.detach()
        better = scores > highest
        highest = torch.where(better, scores, highest)
        best = torch.where(better.view(-1, 1, 1, 1), x.detach(), best)
        if step < steps:
            (gradient,) = torch.autograd.grad(total, x)
            # A picture that no longer gains stays where it is.
            x = match_spectrum(x.detach() + rate * unit_direction(gradient), noise)
    return best


def best_neighbour(
    noise: torch.Tensor, others: Sequence[torch.Tensor], score: Score, *, spread: float
) -> torch.Tensor:
    """The noise, or of `sqrt(1 - spread^2) noise + spread other` the one that scores best, sample by sample.

    Args:
        others: fresh noises, each of the shape of `noise`.
        score: needs no gradient.
        spread: in (0, 1]; 1 leaves nothing of `noise`.
    """
    if not 0 < spread <= 1:
        raise ValueError(f"`spread` must be in (0, 1], got {spread}.")
    best, highest = noise, score(noise)
    for other in others:
        candidate = math.sqrt(1 - spread**2) * noise + spread * other
        scores = score(candidate)
        better = scores > highest
        highest = torch.where(better, scores, highest)
        best = torch.where(better.view(-1, 1, 1, 1).to(noise.device), candidate, best)
    return best


@dataclass(frozen=True)
class RewardLoss:
    """`regularization / 2 * mean(f^2) - mean(f u)` of the change f, u the reward's gradient with mean square 1.

    Noise is drawn anew for every prompt of a batch. The gradient is taken at the golden noise with its spectrum
    matched, in a pass of its own, so that no graph holds network and sampler at once.
    """

    cache: TextCache
    device: torch.device  # of the network
    masked: bool  # whether the network takes an attention mask
    draw: Callable[[torch.Tensor, TextConditioning, Sequence[int]], torch.Tensor]  # pictures, with a gradient
    score: Callable[[torch.Tensor, Sequence[str]], torch.Tensor]  # of pictures in [0, 1], with a gradient
    regularization: float
    prompts: Sequence[str]  # by the row of their text

    def __call__(
        self, model: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """`loss`; `reward` of the golden noise; `change`, its mean square."""
        noise = draw_rows(torch.randn, batch["noise"].shape, generator).to(self.device)
        seeds = draw_rows(partial(torch.randint, 2**62), (len(noise),), generator).tolist()
        text = self.cache.take(batch["text"], self.device)
        golden = model(noise, **pair_inputs(text, self.masked)).float()
        x = match_spectrum(golden.detach(), noise).requires_grad_()
        rewards = self.score(self.draw(x, text, seeds), [self.prompts[row] for row in batch["text"].tolist()])
        (gradient,) = torch.autograd.grad(rewards.sum(), x)
        change = (golden - noise).square().mean()
        gained = ((golden - noise) * unit_direction(gradient)).mean()
        return {
            "loss": self.regularization / 2 * change - gained,
            "reward": rewards.mean().detach(),
            "change": change.detach(),
        }


def unit_direction(gradient: torch.Tensor) -> torch.Tensor:
    """Each sample's gradient with a mean square of 1; zeros stay."""
    length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1) / math.sqrt(gradient[0].numel())
    return torch.where(length > 0, gradient / length, 0.0)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be positive, got {value}.")
