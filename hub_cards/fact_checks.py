"""What a card must be told: all of it, nothing else, and each fact as what it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from hub_cards.card_facts import Licence, Measured
from hub_cards.kinds import Kind
from hub_cards.safe_markdown import check_file_name


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_DIRECTIONS = ("generalized", "null", "soft", "plain")
# Names of classes, which end up in import statements.
_CLASSES = ("pipeline", "plain_pipeline", "network")
_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(
        (
            "rank", "parameters", "layers", "num_prompts", "num_pairs", "num_rejected",
            "num_steps", "text_embed_dim",
        ),
        (Integral, "a whole number"),
    ),
    "megabytes": (Real, "a number"),
    "statistics": (bool, "True or False"),
    "any_size": (bool, "True or False"),
    **dict.fromkeys(
        ("example_prompts", "preserved_concepts", "latent_shape"), ((list, tuple), "a list")
    ),
}  # fmt: skip


def check_common(repo_id: str, base: str, licence: Licence, trained_on: str, version: str) -> None:
    """Raise unless these facts of every card say something."""
    if not isinstance(repo_id, str) or not HUB_NAME.fullmatch(repo_id):
        raise ValueError(f"`repo_id` must be 'user/name', got {repo_id!r}.")
    if not isinstance(licence, Licence):
        raise TypeError(f"`licence` must be a Licence, got a {type(licence).__name__}.")
    for name, value in (("base", base), ("trained_on", trained_on), ("version", version)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"`{name}` must say something in a card, got {value!r}.")


def check_lists(
    settings: Mapping[str, object],
    results: Sequence[Measured],
    widget: Sequence[tuple[str, str]],
) -> None:
    """Raise unless settings are words and numbers, and results and pictures are what they should."""
    for name, value in settings.items():
        if not isinstance(value, (str, Real)):
            raise TypeError(
                f"`settings` must hold numbers and words, got a {type(value).__name__} for "
                f"{name!r}."
            )
    for result in results:
        if not isinstance(result, Measured):
            raise TypeError(f"`results` must hold Measured, got a {type(result).__name__}.")
    for pair in widget:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"`widget` must hold pairs of prompt and file, got {pair!r}.")
        check_file_name(pair[1], "widget")


def check_facts(kind: str, found: Kind, facts: Mapping[str, Any]) -> None:
    """Raise unless a kind's own facts are all there, say something and are of their type."""
    for name in found.facts:
        if name not in facts:
            raise ValueError(
                f"`{name}` must be given for a card of kind {kind!r}, got only {sorted(facts)}."
            )
        if facts[name] is None or facts[name] == "":
            if name not in found.may_be_empty:
                raise ValueError(f"`{name}` must say something in a card, got {facts[name]!r}.")
        else:
            _check_value(name, facts[name])
    unknown = sorted(facts.keys() - set(found.facts))
    if unknown:
        raise ValueError(
            f"A card of kind {kind!r} must have no facts but {list(found.facts)}, got {unknown}."
        )


def _check_value(name: str, value: Any) -> None:
    wanted, words = _TYPES.get(name, (str, "words"))
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise TypeError(f"`{name}` must be {words}, got a {type(value).__name__}.")
    if name in _CLASSES and not value.isidentifier():
        raise ValueError(f"`{name}` must be the name of a class, got {value!r}.")
    for item in value if isinstance(value, (list, tuple)) else ():
        kind, words = (Integral, "whole numbers") if name == "latent_shape" else (str, "words")
        if not isinstance(item, kind) or isinstance(item, bool):
            raise TypeError(f"`{name}` must hold {words}, got a {type(item).__name__}: {item!r}.")
    if name == "directions" and value not in _DIRECTIONS:
        raise ValueError(f"`directions` must be one of {_DIRECTIONS}, got {value!r}.")
