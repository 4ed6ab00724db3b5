"""Two rewards for pictures of the digits model: one filters training pairs, the other never does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline

from diffusers_ext.core.pictures import rgb_picture
from examples.digits.pictures import read_ink, real_digits, tint
from examples.digits.prompts import COLORS, DIGITS, read_prompt


def digit_samples() -> tuple[np.ndarray, np.ndarray]:
    """What both rewards learn from: every real digit in place and moved by up to two pixels.

    Returns:
        Ink `(2 * 1797, 64)` float32 and labels `(2 * 1797,)`; sample `i + 1797` is digit `i`, in place.
    """
    ink, labels = real_digits()
    shifts = np.random.default_rng(0).integers(-2, 3, size=(len(ink), 2))
    moved = [tint(i, "white", tuple(shift)) for i, shift in zip(ink, shifts, strict=True)]
    pictures = np.stack(moved + [tint(i, "white") for i in ink])
    return read_ink(pictures).reshape(len(pictures), -1), np.tile(labels, 2)


def kernel_classifier() -> Pipeline:
    """Multinomial logistic regression on approximate RBF features, untrained.

    Its probabilities minimise the log loss by themselves. A support vector machine with a sigmoid per class reads
    digits as well, but stops at 0.98 whatever the picture, so it cannot rank good ones.
    """
    features = Nystroem(gamma=0.25, n_components=600, random_state=0)
    return make_pipeline(features, LogisticRegression(C=100.0, max_iter=3000))


class DigitsReward:
    """Probability of the digit that the prompt names, by kernel logistic regression."""

    name, version = "digits-judge", "kernel-logistic-1"

    def __init__(self) -> None:
        self._classifier = kernel_classifier().fit(*digit_samples())

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """Probabilities `(n,)`, float32; raises `ValueError` for a prompt without a digit."""
        wanted = [DIGITS.index(named_digit(prompt)) for prompt in prompts]
        probabilities = self._classifier.predict_proba(ink_of(images))
        return torch.from_numpy(probabilities[np.arange(len(wanted)), wanted]).float()

    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """What the classifier's last layer reads of pictures, `(n, 600)` float32."""
        return torch.from_numpy(self._classifier[:-1].transform(ink_of(images))).float()

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Probabilities `(n,)` of pictures `(n, 3, 32, 32)` in [0, 1], float32, with a gradient."""
        features, regression = self._classifier
        centres, turn, weights, offsets = (
            torch.from_numpy(part).to(pixels.device, torch.float64)
            for part in (features.components_, features.normalization_, regression.coef_, regression.intercept_)
        )
        ink = F.avg_pool2d(pixels.double().amax(1), pixels.shape[-1] // 8).flatten(1)
        distances = (ink[:, None] - centres).square().sum(2)
        logits = torch.exp(-features.gamma * distances) @ turn.T @ weights.T + offsets
        wanted = torch.tensor([DIGITS.index(named_digit(prompt)) for prompt in prompts], device=pixels.device)
        return logits.softmax(1).gather(1, wanted[:, None]).flatten().float()


class SecondDigitsReward:
    """Share of the 15 nearest real digits that agree with the prompt, times how near the tint is.

    Another classifier, and the colour, which `DigitsReward` does not look at.
    """

    name, version = "digits-neighbours", "knn-1"

    def __init__(self) -> None:
        self._neighbours = KNeighborsClassifier(15, weights="distance").fit(*digit_samples())

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """Values `(n,)` in [0, 1], float32; raises `ValueError` for a prompt without a digit."""
        shares = self._neighbours.predict_proba(ink_of(images))
        wanted = [DIGITS.index(named_digit(prompt)) for prompt in prompts]
        colors = [read_prompt(prompt)[0] for prompt in prompts]
        pixels = to_pixels(images)
        nearness = np.array([tint_nearness(p, c) for p, c in zip(pixels, colors, strict=True)])
        return torch.from_numpy(shares[np.arange(len(wanted)), wanted] * nearness).float()


def to_pixels(images: Sequence[Image.Image]) -> np.ndarray:
    """Pictures as `(n, 32, 32, 3)` uint8; raises `ValueError` for another size."""
    pixels = np.stack([np.asarray(rgb_picture(image)) for image in images])
    if pixels.shape[1:] != (32, 32, 3):
        raise ValueError(f"`images` must be 32x32, got {pixels.shape[1]}x{pixels.shape[2]}.")
    return pixels


def ink_of(images: Sequence[Image.Image]) -> np.ndarray:
    """The ink of pictures, `(n, 64)` in [0, 1]."""
    return read_ink(to_pixels(images)).reshape(len(images), -1)


def named_digit(prompt: str) -> str:
    """The digit word of a prompt; raises `ValueError` where there is none."""
    digit = read_prompt(prompt)[1]
    if digit is None:
        raise ValueError(f"`prompts` must each name a digit, got {prompt!r}.")
    return digit


def tint_nearness(pixels: np.ndarray, color: str | None) -> float:
    """Cosine of the ink's mean colour and a named tint; 1 where the prompt names none.

    Args:
        pixels: one picture `(height, width, 3)` uint8.
        color: one of `COLORS`, or `None`.
    """
    if color is None:
        return 1.0
    values = pixels.reshape(-1, 3).astype(np.float64)
    mean = (values * values.max(axis=1, keepdims=True) ** 2).sum(axis=0)
    tint_color = np.array(COLORS[color])
    norms = np.linalg.norm(mean) * np.linalg.norm(tint_color)
    return float(mean @ tint_color / norms) if norms > 0 else 0.0
