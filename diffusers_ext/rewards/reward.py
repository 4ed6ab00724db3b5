"""What every reward promises, and the checks that keep a broken one from deciding anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image


class Reward(Protocol):
    """Whatever says how well a picture fits its prompt; larger is better."""

    name: str  # of the metric, e.g. "hpsv2"
    version: str  # what else the numbers depend on; belongs in every result beside the name

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """Scores `(n,)` of `n` pictures, each for its own prompt, float32 on the CPU."""
        ...


class DifferentiableReward(Reward, Protocol):
    """A reward that also tells in which direction each pixel makes it rise."""

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """As `score`, of pictures `(n, 3, height, width)` in [0, 1]; float32 on their device, with a gradient."""
        ...


def check_differentiable(reward: Reward, name: str = "reward") -> DifferentiableReward:
    """The reward, if it has a gradient; raises `ValueError` otherwise. `name` is the flag's."""
    if not callable(getattr(reward, "score_pixels", None)):
        raise ValueError(
            f"`{name}` must be differentiable for this target, with a method `score_pixels(pixels, prompts)`, got "
            f"{reward.name!r}, which has none. Take hpsv2, pickscore or clip_score, or `--target best_of_n`, "
            "for which any reward does."
        )
    return reward


def check_pairs(images: Sequence[Image.Image], prompts: Sequence[str]) -> tuple[list[Image.Image], list[str]]:
    """Both as lists."""
    pictures, texts = list(images), list(prompts)
    if not pictures:
        raise ValueError("`images` must hold at least one picture, got none.")
    if isinstance(prompts, str) or len(texts) != len(pictures):
        raise ValueError(f"`prompts` must hold one prompt per image ({len(pictures)}), got {prompts!r:.80}.")
    for name, items, kind in (("images", pictures, Image.Image), ("prompts", texts, str)):
        wrong = [type(item).__name__ for item in items if not isinstance(item, kind)]
        if wrong:
            raise TypeError(f"`{name}` must hold {kind.__name__} only, got {wrong[0]}.")
    return pictures, texts


def checked_scores(reward: Reward, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
    """The scores `(n,)` of any reward, the user's own included, after a look at what it gave; float32 on the CPU."""
    pictures, texts = check_pairs(images, prompts)
    return check_scores(reward.score(pictures, texts), texts, reward.name)


def check_scores(scores: Any, prompts: Sequence[str], name: str) -> torch.Tensor:
    """Scores as float32 on the CPU; raises `ValueError` unless they are one number per prompt."""
    values = torch.as_tensor(scores).detach().to("cpu", torch.float32)
    if values.shape != (len(prompts),):
        raise ValueError(
            f"The scores of {name!r} must have shape ({len(prompts)},), one per image, got {tuple(values.shape)}."
        )
    broken = torch.nonzero(~values.isfinite()).flatten().tolist()
    if broken:
        raise ValueError(
            f"The scores of {name!r} must be numbers, got {values[broken[0]].item()} for "
            f"{len(broken)} of {len(prompts)} pictures, the first with prompt "
            f"{prompts[broken[0]]!r:.80}. Look at that picture; a model in float16 may overflow."
        )
    return values
