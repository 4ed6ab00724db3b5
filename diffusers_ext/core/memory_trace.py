"""Peak memory of a computation from the shapes of its tensors: nothing is computed or allocated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTrace(TorchDispatchMode):
    """Counts the bytes of tensors that are alive among those created while it is on.

    Workspaces inside of kernels and the rounding of allocators are not seen. Under `fake_tensors`
    the same is counted without any memory.

    Args:
        known: tensors that exist already; neither they nor their views count.

    Attributes:
        live: bytes alive now.
        peak: the most bytes alive at once.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation and count the storages that it makes."""
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = None
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size


def fake_tensors() -> FakeTensorMode:
    """A mode under which tensors have shapes and no data."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fill_with_fake_tensors(module: torch.nn.Module) -> None:
    """Give a module from the meta device fake CPU tensors; call it under `fake_tensors`.

    The meta device itself takes other paths through attention than a device with data does.

    Args:
        module: with all parameters and buffers on the meta device; changed in place.

    Raises:
        ValueError: some have data.
    """
    tensors = (*module.named_parameters(), *module.named_buffers())
    real = [name for name, tensor in tensors if not tensor.is_meta]
    if real:
        raise ValueError(f"`module` must be on the meta device, got data in {real[0]!r}.")
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                part._parameters[name] = torch.nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, each counted by itself."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
