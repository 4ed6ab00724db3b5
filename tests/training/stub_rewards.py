"""Rewards that need no model: how bright a picture is, and two that decide nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image


class Brightness:
    """The mean of a picture's pixels."""

    name, version = "brightness", "1"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """Means `(n,)` in [0, 255]."""
        return torch.tensor([float(np.asarray(image).mean()) for image in images])


class Constant(Brightness):
    """The same for all pictures."""

    name = "constant"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """Ones `(n,)`."""
        return torch.ones(len(images))


class BrokenForNine(Brightness):
    """Not a number for prompts that say "nine"."""

    name = "broken"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """Means `(n,)`, some of them NaN."""
        scores = super().score(images, prompts)
        scores[["nine" in prompt for prompt in prompts]] = torch.nan
        return scores


class DifferentiableBrightness(Brightness):
    """The same, with a gradient."""

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Means `(n,)` in [0, 255] of pictures in [0, 1]."""
        return 255 * pixels.mean((1, 2, 3))
