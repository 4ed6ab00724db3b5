"""Choose submodules by pattern, in natural order; a pattern that matches nothing is an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch


Targets = str | Sequence[str] | Mapping[str, torch.nn.Module]


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts `blocks.2` before `blocks.10`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def match_names(names: Iterable[str], patterns: str | Sequence[str], kind: str) -> list[str]:
    """The names that match a glob pattern, or one of several, in natural order."""
    names = list(names)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError("`targets` must name at least one pattern, got none.")
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise ValueError(
                f"`targets` must match {kind}, got {pattern!r}, which matches none. "
                f"Names look like {next(iter(names), '')!r}."
            )
        chosen |= matched
    return sorted(chosen, key=natural_key)


def find_modules(model: torch.nn.Module, targets: Targets) -> dict[str, torch.nn.Module]:
    """Submodules of `model` by name pattern."""
    if isinstance(targets, Mapping):
        if not targets:
            raise ValueError("`targets` must hold at least one module, got none.")
        return dict(targets)
    modules = {name: module for name, module in model.named_modules() if name}
    chosen = match_names(modules, targets, f"submodules of {type(model).__name__}")
    return {name: modules[name] for name in chosen}
