"""Whether a picture shows the glyph that the rare token of its prompt was taught as."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from examples.digits.judge import DigitsJudge
from examples.digits.pictures import GLYPHS
from examples.digits.prompts import RARE_TOKENS

TAUGHT = dict(zip(RARE_TOKENS, GLYPHS, strict=True))


class GlyphJudge:
    """Reads digits and glyphs, and asks for the glyph: a picture that shows a digit is wrong.

    Args:
        taught: rare token and the glyph it was taught as.
    """

    def __init__(self, taught: Mapping[str, str] = TAUGHT) -> None:
        self.taught, self.judge = dict(taught), DigitsJudge(glyphs=True)

    def correct(self, pictures: np.ndarray | Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """Whether each picture reads as the glyph of its prompt's token, `(n,)` bool.

        Raises:
            ValueError: a prompt without exactly one of the tokens.
        """
        wanted = [self._glyph(prompt) for prompt in prompts]
        names = self.judge.read(pictures).names
        return np.array([name == glyph for name, glyph in zip(names, wanted, strict=True)])

    def _glyph(self, prompt: str) -> str:
        words = set(re.findall(r"[a-z]+", prompt.lower()))
        found = sorted(words & self.taught.keys())
        if len(found) != 1:
            raise ValueError(f"Every subject prompt must hold one of {sorted(self.taught)}, got {prompt!r}.")
        return self.taught[found[0]]
