"""What a computation costs from the shapes of its tensors: memory, operations and bytes moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

from diffusers_ext.core.memory_trace import MemoryTrace


class Operation(NamedTuple):
    """One kernel as a device sees it."""

    flops: int  # of matrix products, convolutions and attention; 0 for everything else
    bytes: int  # read and written
    dtype: torch.dtype  # of what it computes with
    convolution: bool = False


@shape_wrapper
def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


@shape_wrapper
def _cpu_attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# `FlopCounterMode` does not know the CPU's attention.
_ATEN = torch.ops.aten
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class OperationTrace(MemoryTrace):
    """Counts kernels besides memory, by what each of them computes and moves.

    Views are no kernels. The counts are those of `torch.utils.flop_counter`. A tensor without data that
    is read as a number is 1, or true.

    Args:
        known: as for `MemoryTrace`.

    Attributes:
        operations: how often each was run.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__(known)
        self.operations: Counter[Operation] = Counter()

    @property
    def flops(self) -> int:
        """Of all operations together."""
        return sum(operation.flops * count for operation, count in self.operations.items())

    def reset(self) -> None:
        """Count anew from here on: operations, and the peak above what is alive now."""
        self.operations.clear()
        self.peak = self.live

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation and count what it makes and moves."""
        kwargs = kwargs or {}
        if function is _ATEN._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if not getattr(function, "is_view", False):
            self._count_operation(function, args, kwargs, result)
        return result

    def _count_operation(
        self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], result: Any
    ) -> None:
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if not read or not written:
            return
        count_flops = _FLOPS.get(getattr(function, "_overloadpacket", None))
        flops = 0 if count_flops is None else int(count_flops(*args, **kwargs, out_val=result))
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (*read, *written))
        dtypes = [tensor.dtype for tensor in read if tensor.is_floating_point()]
        dtype = dtypes[0] if dtypes else read[0].dtype
        convolution = "convolution" in str(function)
        self.operations[Operation(flops, moved, dtype, convolution)] += 1
