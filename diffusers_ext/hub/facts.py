"""What the facts of a card may be; imports nothing, as settings, which a help text reads, share them."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

DIRECTIONS = ("generalized", "null", "soft", "plain")  # in which a null-space LoRA is trained
# Names of classes, which end up in import statements.
_CLASSES = ("pipeline", "plain_pipeline", "network")
# All others are words.
_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    name: known
    for names, known in (
        ("rank parameters layers text_embed_dim num_prompts", (Integral, "a whole number")),
        ("num_pairs num_rejected num_steps", (Integral, "a whole number")),
        ("megabytes", (Real, "a number")),
        ("statistics any_size", (bool, "True or False")),
        ("example_prompts preserved_concepts latent_shape targets anchors", ((list, tuple), "a list")),
    )
    for name in names.split()
}


def check_fact(name: str, value: Any) -> None:
    """Raise `TypeError` or `ValueError` where a fact is not what a card can say of it."""
    wanted, words = _TYPES.get(name, (str, "words"))
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise TypeError(f"`{name}` must be {words}, got a {type(value).__name__}.")
    if name in _CLASSES and not value.isidentifier():
        raise ValueError(f"`{name}` must be the name of a class, got {value!r}.")
    for item in value if isinstance(value, (list, tuple)) else ():
        kind, words = (Integral, "whole numbers") if name == "latent_shape" else (str, "words")
        if not isinstance(item, kind) or isinstance(item, bool):
            raise TypeError(f"`{name}` must hold {words}, got a {type(item).__name__}: {item!r}.")
    if name == "directions" and value not in DIRECTIONS:
        raise ValueError(f"`directions` must be one of {DIRECTIONS}, got {value!r}.")
