"""State that comes back: calls of one thread alone, attributes held for a while, quiet runs of a pipeline."""

from __future__ import annotations

import copy
import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


_NAME = "diffusers_ext_call_scopes"
_OPEN: ContextVar[tuple[CallScope, ...]] = ContextVar(_NAME, default=())
_LOCK = threading.RLock()
_HOLDINGS: dict[tuple[int, str], _Holding] = {}


class CallScope:
    """Tells the calls inside of its `with` block from those of other threads and tasks.

    A hook on a model is run by every thread that uses the model. Like `torch.no_grad`, what a context does to a model
    is for the thread that opened it: another request must neither lose its eraser nor be recorded. Tasks of `asyncio`
    count as inside. Scopes may be closed in any order, and in another thread.
    """

    def __init__(self) -> None:
        self.is_open = False

    def __enter__(self) -> CallScope:
        self.is_open = True
        _set_open((*_OPEN.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        # A context that was copied meanwhile may list it on; closed, it covers nothing there.
        self.is_open = False
        _set_open(tuple(scope for scope in _OPEN.get() if scope is not self))

    def covers_this_call(self) -> bool:
        """Whether the code that asks runs inside of the block."""
        return self.is_open and self in (_OPEN.get() or _open_where_backward_was_called())


def _set_open(scopes: tuple[CallScope, ...]) -> None:
    _OPEN.set(scopes)
    _stash(_NAME, scopes)


def _open_where_backward_was_called() -> tuple[CallScope, ...]:
    # On a GPU gradient checkpointing recomputes in threads of autograd, which have a context of their
    # own; torch hands them what was stashed in the thread that called `backward`.
    if torch._C._current_graph_task_id() == -1 or not torch._C._is_key_in_tls(_NAME):
        return ()
    scopes = torch._C._get_obj_in_tls(_NAME)
    if not _IS_COUNTED:
        _hold(scopes)
    return scopes


def _stash(name: str, value: object) -> None:
    if not _IS_COUNTED:
        _hold(value)
    torch._C._stash_obj_in_tls(name, value)


def _hold(value: object) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def _stashed_is_counted() -> bool:
    """Whether torch counts its references to what it stashes. 2.7 only takes them back, which frees what is in use."""
    probe, name = object(), f"{_NAME}_probe"
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls(name, probe)
    counted = sys.getrefcount(probe) > before
    if not counted:
        _hold(probe)
    torch._C._stash_obj_in_tls(name, None)
    return counted


_IS_COUNTED = _stashed_is_counted()


class _Absent:
    """In the place of the value of an attribute that was not there."""


class _Holding:
    """The value that an attribute had, and those that contexts have given it since, in order."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.held: list[tuple[object, Any]] = []


def _own_value(owner: object, name: str) -> Any:
    """What is to be given back: not a method or a default that the class has for all."""
    of_class = getattr(type(owner), name, _Absent)
    if of_class is not _Absent and not hasattr(of_class, "__set__") and name not in vars(owner):
        return _Absent
    return getattr(owner, name, _Absent)


Write = Callable[[object, str, Any], None]


def _take(mine: object, owner: object, name: str, value: Any, write: Write) -> None:
    """Give an attribute a value for `mine`, under the lock."""
    key = (id(owner), name)
    holding = _HOLDINGS.get(key) or _Holding(_own_value(owner, name))
    write(owner, name, value)
    holding.held.append((mine, value))
    _HOLDINGS[key] = holding


def _give_back(mine: object, owner: object, name: str, write: Write) -> None:
    """Take back what `mine` gave an attribute, under the lock."""
    key = (id(owner), name)
    holding = _HOLDINGS[key]
    was_latest = holding.held[-1][0] is mine
    holding.held = [entry for entry in holding.held if entry[0] is not mine]
    if not holding.held:
        del _HOLDINGS[key]
    if was_latest:
        restored = holding.held[-1][1] if holding.held else holding.before
        if restored is _Absent:
            delattr(owner, name)
        else:
            write(owner, name, restored)


@contextmanager
def held_attribute(owner: object, name: str, value: Any, write: Write = setattr) -> Iterator[None]:
    """Give an attribute a value while the context is open, by `write(owner, name, value)`.

    Contexts on the same attribute are counted: whatever the order in which they close, also in other threads and after
    an exception, the attribute has the latest value that is still held, and after the last one that which it had
    before the first. An attribute that was not there, or only in the class, goes again.
    """
    mine = object()
    with _LOCK:
        _take(mine, owner, name, value, write)
    try:
        yield
    finally:
        with _LOCK:
            _give_back(mine, owner, name, write)


def _write_another(owner: object, name: str, value: Any) -> None:
    # Modules look at every value that they are given; most have this one.
    if vars(owner).get(name, _Absent) is not value:
        setattr(owner, name, value)


@contextmanager
def module_eval_mode(*modules: torch.nn.Module) -> Iterator[None]:
    """Modules and all their parts in eval mode; each part's own is back once the last thread is done."""
    # One context for all: a large model has thousands of parts, and this is opened at every call.
    parts: dict[torch.nn.Module, None] = {}
    waiting = list(modules)
    while waiting:
        if (part := waiting.pop()) not in parts:
            parts[part] = None
            waiting.extend(part.children())
    mine, held = object(), []
    try:
        with _LOCK:
            for part in parts:
                _take(mine, part, "training", False, _write_another)
                held.append(part)
        yield
    finally:
        with _LOCK:
            for part in held:
                _give_back(mine, part, "training", _write_another)


def eval_mode(pipeline: DiffusionPipeline) -> AbstractContextManager[None]:
    """`module_eval_mode` of all of a pipeline's models."""
    components = pipeline.components.values()
    return module_eval_mode(*(c for c in components if isinstance(c, torch.nn.Module)))


@contextmanager
def quiet_run(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Run a pipeline in eval mode, without its bar and on a copy of its scheduler; all come back.

    They are back once the last of several threads is done; but a pipeline has one scheduler, so that threads that draw
    at the same time need a pipeline each (`from_pipe` shares the models).
    """
    scheduler, no_bar = copy.deepcopy(pipeline.scheduler), {"disable": True}
    with (
        held_attribute(pipeline, "scheduler", scheduler),
        held_attribute(pipeline, "_progress_bar_config", no_bar),
        eval_mode(pipeline),
    ):
        yield
