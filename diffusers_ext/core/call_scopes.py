"""Whose call is it: contexts that act on the calls of the thread or task that opened them alone."""

from __future__ import annotations

from contextvars import ContextVar

import torch


_NAME = "diffusers_ext_call_scopes"
_OPEN: ContextVar[tuple[CallScope, ...]] = ContextVar(_NAME, default=())


class CallScope:
    """Tells the calls inside of its `with` block from those of other threads and tasks.

    A hook on a model is run by every thread that uses the model. Like `torch.no_grad`, what a context
    does to a model is for the thread that opened it: another request must neither lose its eraser nor
    be recorded. Tasks of `asyncio`, and threads that get a copy of the context (`asyncio.to_thread`),
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
    torch._C._stash_obj_in_tls(_NAME, scopes)


def _open_where_backward_was_called() -> tuple[CallScope, ...]:
    # On a GPU gradient checkpointing recomputes in threads of autograd, which have a context of their
    # own; torch hands them what was stashed in the thread that called `backward`.
    if torch._C._current_graph_task_id() == -1 or not torch._C._is_key_in_tls(_NAME):
        return ()
    return torch._C._get_obj_in_tls(_NAME)
