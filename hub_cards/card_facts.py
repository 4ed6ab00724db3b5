"""What callers say about an artifact, in the form that a card needs: its licence, what was measured."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from hub_cards.safe_markdown import code, link


@dataclass(frozen=True)
class Licence:
    """A licence by the Hub's three header keys.

    Args:
        license: identifier of the Hub's list, as `"apache-2.0"`; `"other"` for any further one.
        license_name: identifier of a licence that is not on the list.
        license_link: its address, or a file of the repository.

    Raises:
        ValueError: no licence, or another one without its name.
    """

    license: str
    license_name: str | None = None
    license_link: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.license, str) or not self.license.strip():
            raise ValueError(f"`license` must name a licence, got {self.license!r}.")
        if self.license == "other" and not self.license_name:
            raise ValueError(
                "`license_name` must be given with the license 'other', got "
                f'{self.license_name!r}. Pass `Licence("other", "its-name", "https://its.address")`, '
                "or none where the base model is on the Hub and its card tells."
            )

    @property
    def sentence(self) -> str:
        """What a card's text says about it."""
        name = code(self.license_name or self.license)
        return f"These files are shared under {link(name, self.license_link)}."


@dataclass(frozen=True)
class Measured:
    """One measured figure.

    Args:
        dataset: what it was measured on, in words.
        metric: what was measured, in words.
        value: the figure.
        name: of the row, where one metric has several on one data set; the metric's by default.
        notes: seeds, interval and the like, for the table.

    Raises:
        ValueError: a data set or metric without letters, or a value that is not finite.
        TypeError: a value that is no number.
    """

    dataset: str
    metric: str
    value: float
    name: str | None = None
    notes: str | None = None

    def __post_init__(self) -> None:
        for field in ("dataset", "metric"):
            if not slug(getattr(self, field)):
                raise ValueError(
                    f"`{field}` must hold a letter or a digit, got {getattr(self, field)!r}."
                )
        if isinstance(self.value, bool) or not hasattr(self.value, "__float__"):
            raise TypeError(f"`value` must be a number, got a {type(self.value).__name__}.")
        if not math.isfinite(self.value):
            raise ValueError(f"`value` must be finite, got {self.value} for {self.metric!r}.")


def slug(words: str) -> str:
    """Words as an identifier: lower case, runs of anything but letters and digits as one hyphen."""
    return re.sub(r"[\W_]+", "-", words.lower()).strip("-")
