"""Choose submodules by pattern, in natural order; a pattern that matches nothing is an error."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch


Targets = str | Sequence[str] | Mapping[str, torch.nn.Module]


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts `blocks.2` before `blocks.10`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def find_modules(model: torch.nn.Module, targets: Targets) -> dict[str, torch.nn.Module]:
    """Submodules of `model` by name pattern.

    Args:
        model: any module.
        targets: a glob pattern on dotted names (`"*attn2.to_k"`), several of them, or a ready `{name: module}`.

    Returns:
        `{name: module}` in natural order of the names.

    Raises:
        ValueError: a pattern matches no submodule.
    """
    if isinstance(targets, Mapping):
        return dict(targets)
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise ValueError("`targets` must name at least one pattern, got none.")
    modules = {name: module for name, module in model.named_modules() if name}
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in modules if fnmatchcase(name, pattern)}
        if not matched:
            raise ValueError(
                f"`targets` must match submodules of {type(model).__name__}, got {pattern!r}, "
                f"which matches none. Names look like {next(iter(modules), '')!r}."
            )
        chosen |= matched
    return {name: modules[name] for name in sorted(chosen, key=natural_key)}
