"""What clips show, told by CLIP without training: which of some words fits their frames best."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_ext.rewards.clip import CLIPReward


class CLIPDetector:
    """Zero-shot classification of clips (Radford et al., arXiv 2103.00020, section 3.1).

    Every frame gets probabilities over the classes, a softmax over CLIP's scaled cosines with their texts;
    a clip is of the class with the largest mean over its frames.

    Args:
        clip: e.g. `CLIPScoreReward.from_pretrained(...)`.
        classes: words, the concept among them. The more there are besides those of interest, such as
            `"something else"`, the fewer clips are forced into one of these.
        template: of the texts, with `{}` where the class stands.
        frames: of a clip, evenly spaced; all when `None`.
    """

    name, concept_aspect = "clip", "concept"

    def __init__(
        self,
        clip: CLIPReward,
        classes: Sequence[str],
        concept: str,
        *,
        template: str = "a photo of {}",
        frames: int | None = 8,
    ) -> None:
        classes = [classes] if isinstance(classes, str) else [name.strip() for name in classes]
        if len(classes) < 2 or len({name.lower() for name in classes}) < len(classes):
            raise ValueError(f"`classes` must be two different words at least, got {classes}.")
        if concept.strip() not in classes or "" in classes:
            raise ValueError(f"`concept` must be one of `classes`, {classes}, got {concept!r}.")
        if "{}" not in template:
            raise ValueError(f"`template` must hold '{{}}' for the class, got {template!r}.")
        if frames is not None and frames < 1:
            raise ValueError(f"`frames` must be at least 1, got {frames}.")
        self.clip, self.classes, self.concept = clip, classes, concept.strip()
        self.template, self.frames = template, frames
        self._texts = clip.text_features([template.format(name) for name in classes])

    @property
    def version(self) -> str:
        """The CLIP model."""
        return self.clip.version

    @property
    def facts(self) -> dict[str, Any]:
        """What else the verdicts depend on."""
        names = ("classes", "concept", "template", "frames")
        return {name: getattr(self, name) for name in names}

    def probabilities(self, clips: np.ndarray) -> torch.Tensor:
        """Of every class, `(n, classes)` float32, for clips `(n, frames, height, width, 3)` uint8."""
        count = clips.shape[1]
        shown = count if self.frames is None else min(self.frames, count)
        chosen = np.linspace(0, count - 1, shown).round().astype(int)
        pictures = [Image.fromarray(clip[frame]) for clip in clips for frame in chosen]
        cosines = self.clip.image_features(pictures) @ self._texts.T
        scale = self.clip.model.logit_scale.detach().exp().float().cpu()
        return (scale * cosines).softmax(dim=1).unflatten(0, (len(clips), shown)).mean(1)

    def correct(self, clips: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Read clips `(n, frames, height, width, 3)` uint8.

        Gives `"concept"`, whether the clip shows it, whatever its prompt; `"class"`, whether it shows the class
        that its prompt names, masked where it names none; `"shown"`, the class; `"concept_probability"`.
        """
        found = self.probabilities(clips)
        shown = [self.classes[index] for index in found.argmax(dim=1).tolist()]
        named = [self._named(prompt) for prompt in prompts]
        right = [one == other for one, other in zip(shown, named, strict=True)]
        return {
            "concept": np.array([name == self.concept for name in shown]),
            "class": np.ma.array(right, mask=[name is None for name in named]),
            "shown": np.array(shown),
            "concept_probability": found[:, self.classes.index(self.concept)].double().numpy(),
        }

    def _named(self, prompt: str) -> str | None:
        """The class that stands in a prompt as whole words; the first one, and the longest there."""
        places = [
            (match.start(), -len(name), name)
            for name in self.classes
            if (match := re.search(rf"(?<!\w){re.escape(name)}(?!\w)", prompt, re.IGNORECASE))
        ]
        return min(places)[2] if places else None
