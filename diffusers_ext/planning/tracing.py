"""What shapes of tensors tell: memory, operations and bytes moved of a computation, and sizes of files."""

from __future__ import annotations

import json
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from diffusers_ext.planning.optimizers import optimizer_bytes

# Report and configs of a result: settings, history, sampled weights that tell models apart.
REPORT_BYTES = 8 * 1024
# What a checkpoint holds besides tensors: random states, schedule, and the facts of its run.
_CHECKPOINT_TEXT_BYTES = 36 * 1024
_SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
}  # fmt: skip


@contextmanager
def gpu_autocast(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Autocast on the CPU with what a GPU does besides: its norms compute in float32 and give float32.

    Only for a model that is thrown away: its norms stay so, for gradient checkpointing runs them again in the backward
    pass.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm):
            module.forward = partial(_float32_norm, module)
    with torch.autocast("cpu", dtype):
        yield


def _float32_norm(module: torch.nn.LayerNorm | torch.nn.GroupNorm, features: torch.Tensor) -> torch.Tensor:
    affine = (None if p is None else p.float() for p in (module.weight, module.bias))
    if isinstance(module, torch.nn.GroupNorm):
        return functional.group_norm(features.float(), module.num_groups, *affine, module.eps)
    return functional.layer_norm(features.float(), module.normalized_shape, *affine, module.eps)


def fake_tensors() -> FakeTensorMode:
    """A mode under which tensors have shapes and no data."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fill_with_fake_tensors(module: torch.nn.Module) -> None:
    """Give a module from the meta device fake CPU tensors; call it under `fake_tensors`.

    The meta device itself takes other paths through attention than a device with data does. Raises `ValueError` where
    a parameter or buffer has data.
    """
    move_other_tensors(module, torch.device("cpu"))
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


def move_other_tensors(module: torch.nn.Module, device: torch.device) -> None:
    """Put zeros on a device in the place of a module's tensors that are neither parameters nor buffers.

    Qwen-Image keeps its angles so. Only those on the meta device are replaced.
    """
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                part.__dict__[name] = torch.zeros(value.shape, dtype=value.dtype, device=device)


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, each counted by itself."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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


class _Trace(TorchDispatchMode):
    """Lets `_ran` see every operation; a tensor without data that is read as a number is 1, or true, unseen."""

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is _ATEN._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1
        result = function(*args, **kwargs)
        self._ran(function, args, kwargs, result)
        return result

    def _ran(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        raise NotImplementedError


class OperationTrace(_Trace):
    """Counts kernels while it is on, by what each of them computes and moves, and the bytes of the tensors they make.

    Workspaces inside of kernels and the rounding of allocators are not seen; views are no kernels. Tensors that are
    `known`, and their views, do not count. Under `fake_tensors` the same is counted without any memory; a tensor
    without data that is read as a number is 1, or true.

    Attributes:
        live, peak: bytes alive now, and the most at once.
        operations: how often each was run, with the counts of `torch.utils.flop_counter`.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.operations: Counter[Operation] = Counter()
        self._seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = None

    def reset(self) -> None:
        """Count anew from here on: operations, and the peak above what is alive now."""
        self.operations.clear()
        self.peak = self.live

    def _ran(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in written:
            self._count_storage(tensor.untyped_storage())
        if not getattr(function, "is_view", False):
            self._count_operation(function, args, kwargs, result, written)

    def _count_storage(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = None
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size

    def _count_operation(
        self,
        function: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        result: Any,
        written: list[torch.Tensor],
    ) -> None:
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not read or not written:
            return
        count_flops = _FLOPS.get(getattr(function, "_overloadpacket", None))
        flops = 0 if count_flops is None else int(count_flops(*args, **kwargs, out_val=result))
        moved = tensor_bytes([*read, *written])
        dtypes = [tensor.dtype for tensor in read if tensor.is_floating_point()]
        dtype = dtypes[0] if dtypes else read[0].dtype
        convolution = "convolution" in str(function)
        self.operations[Operation(flops, moved, dtype, convolution)] += 1


class OriginTrace(_Trace):
    """Notes which of some named tensors every tensor was computed from while it is on; memory that is shared counts.

    It tells without any data what `diffusers_ext.nullspace.text_only` finds with data, from equal inputs.

    Attributes:
        origins: names by storage.
    """

    def __init__(self, named: Mapping[str, Iterable[torch.Tensor]]) -> None:
        super().__init__()
        self.origins: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        for name, tensors in named.items():
            for tensor in tensors:
                self.origins[tensor.untyped_storage()] = frozenset([name])

    def of(self, tensor: torch.Tensor) -> frozenset[str]:
        """The names that a tensor was computed from."""
        return self.origins.get(tensor.untyped_storage(), frozenset())

    def _ran(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        found = frozenset().union(*map(self.of, read))
        for tensor in tree_leaves(result):
            if found and isinstance(tensor, torch.Tensor):
                self.origins[tensor.untyped_storage()] = self.of(tensor) | found


def safetensors_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Size of a safetensors file: its header, which names every tensor and has the `metadata`, and the data."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor_bytes([tensor])
        dtype = _SAFETENSORS_DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + 8 * math.ceil(length / 8) + start


def checkpoint_bytes(
    kept: Iterable[torch.Tensor], trained: Iterable[torch.Tensor], *, ema: bool = False, optimizer: str = "adamw"
) -> int:
    """Size of a checkpoint folder: `kept` weights, the optimizer's state of `trained` ones, with `ema` averages."""
    weights, trained = list(kept), list(trained)
    named = {f"{index:0>60}": tensor for index, tensor in enumerate(weights)}
    size = safetensors_bytes(named) + optimizer_bytes(trained, optimizer) + _CHECKPOINT_TEXT_BYTES
    return size + (tensor_bytes(weights) if ema else 0)
