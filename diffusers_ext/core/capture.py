"""Read what flows into or out of submodules, chosen by pattern: hooks that are always removed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase

import torch

from diffusers_ext.core.restored_state import CallScope

Targets = str | Sequence[str] | Mapping[str, torch.nn.Module]
Sink = Callable[[str, torch.Tensor], None]
_FUSED_AWAY = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


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


@contextmanager
def capture(model: torch.nn.Module, targets: Targets, sink: Sink, *, side: str = "input") -> Iterator[list[str]]:
    """Hand every input (or output) of the target modules to `sink` while the context is open; yields their names.

    The model computes exactly what it computes without the hooks; they are removed on leaving, also after an
    exception. Calls by other threads are not captured. LoRA layers are seen through: the input of a wrapped Linear is
    its own.

    Args:
        targets: glob pattern(s) on dotted names, or `{name: module}`; ones that fused projections bypass are refused.
        sink: `sink(name, features)`, once per forward call, so twice under gradient checkpointing; `features` is
            detached, usually `(batch, tokens, dim)`.
        side: `"input"` (the first argument) or `"output"`.
    """
    if side not in ("input", "output"):
        raise ValueError(f"`side` must be 'input' or 'output', got {side!r}.")
    modules = find_modules(model, targets)
    refuse_fused(model, modules)
    with CallScope() as scope, ExitStack() as hooks:

        def take(name: str, features: torch.Tensor) -> None:
            if torch.compiler.is_compiling() or scope.covers_this_call():
                sink(name, features)

        for name, module in modules.items():
            hooks.callback(_register(module, name, take, side).remove)
        yield list(modules)


def _register(module: torch.nn.Module, name: str, sink: Sink, side: str):
    if side == "output":
        return module.register_forward_hook(lambda _, __, output: sink(name, first_tensor(output)))

    def read_input(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        sink(name, first_tensor(args or tuple(kwargs.values())))

    return module.register_forward_pre_hook(read_input, with_kwargs=True)


def first_tensor(value: torch.Tensor | tuple) -> torch.Tensor:
    """The value, or the first of several, detached."""
    tensor = value[0] if isinstance(value, (tuple, list)) else value
    return tensor.detach()


def refuse_fused(model: torch.nn.Module, modules: Mapping[str, torch.nn.Module]) -> None:
    """Raise `ValueError` for a projection, or its parts, of an attention with fused projections."""
    fused = [attn for attn in model.modules() if getattr(attn, "fused_projections", False)]
    leaves = [getattr(attn, leaf, None) for attn in fused for leaf in _FUSED_AWAY]
    bypassed = {part for leaf in leaves if leaf is not None for part in leaf.modules()}
    for name, module in modules.items():
        if module in bypassed:
            raise ValueError(
                f"`{name}` must not be fused to be read, got fused QKV projections, which bypass "
                "it. Call `unfuse_qkv_projections()` first."
            )
