"""Golden noise that a reward asks for, where there is no guidance to take it from: distilled models and few steps.

Two targets, and the loss of a network that is trained by the reward itself.

- `ascend_reward`: gradient ascent on the noise, `x <- match(x + a sqrt(d) g / |g|)` with `g` the gradient of
  `r(G(x), prompt)` through the sampler G (ReNO, arXiv:2406.04312, there with a penalty that keeps the norm likely).
  `match` puts the energy of every ring of frequency back, so that norm and spectrum stay those of the seed's noise.
- `best_neighbour`: of N noises `sqrt(1 - s^2) x + s z` the one whose picture the reward likes best, for rewards
  without a gradient. With s = 1 they are other seeds, and all that a network can learn of the choice is its mean for
  the prompt, `E[z | prompt, z is best]`; with s < 1 also how it depends on x.
- `RewardLoss`: `-r(G(x + f(x, prompt))) + lambda / 2 mean f^2`. For a change small in its Jacobian the second term is
  the Kullback-Leibler distance of the changed noise from the standard normal (Noise Hypernetworks, arXiv:2508.09968,
  theorem 1), so that the sum draws the reward's tilt of what the model draws by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
            length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            # A picture that no longer gains stays where it is.
            direction = torch.where(length > 0, gradient / length, 0.0)
            x = match_spectrum(x.detach() + rate * math.sqrt(noise[0].numel()) * direction, noise)
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
    """`-reward + regularization / 2 * mean((golden - noise)^2)`; noise is drawn anew for every prompt of a batch."""

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
        noise = torch.randn(batch["noise"].shape, generator=generator).to(self.device)
        seeds = torch.randint(2**62, (len(noise),), generator=generator).tolist()
        text = self.cache.take(batch["text"], self.device)
        golden = model(noise, **pair_inputs(text, self.masked)).float()
        change = (golden - noise).square().mean()
        pictures = self.draw(match_spectrum(golden, noise), text, seeds)
        reward = self.score(pictures, [self.prompts[row] for row in batch["text"].tolist()]).mean()
        return {
            "loss": self.regularization / 2 * change - reward,
            "reward": reward.detach(),
            "change": change.detach(),
        }


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be positive, got {value}.")
