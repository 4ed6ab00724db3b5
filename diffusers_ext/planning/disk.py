"""Sizes of the files that a run leaves, from the shapes of the tensors in them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping

import torch

from diffusers_ext.planning.tracing import tensor_bytes

# Report and configs of a result: settings, history, sampled weights that tell models apart.
REPORT_BYTES = 8 * 1024
# What a checkpoint holds besides tensors: random states, schedule, and the facts of its run.
_CHECKPOINT_TEXT_BYTES = 36 * 1024
_SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def safetensors_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Size of a safetensors file: its header, which names every tensor, and the data.

    Args:
        tensors: by name; without data.
        metadata: text in the header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor_bytes([tensor])
        dtype = _SAFETENSORS_DTYPES[tensor.dtype]
        entry = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        header[name] = entry
        start = stop
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + 8 * math.ceil(length / 8) + start


def optimizer_bytes(trained: Iterable[torch.Tensor]) -> int:
    """Size of the file with AdamW's state: both moments, and what the format adds to each."""
    trained = list(trained)
    if not trained:
        return 0
    stand_ins = [torch.nn.Parameter(torch.zeros(1)) for _ in trained]
    optimizer = torch.optim.AdamW(stand_ins)
    for stand_in in stand_ins:
        stand_in.grad = torch.zeros(1)
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    return buffer.getbuffer().nbytes + 2 * tensor_bytes(trained)


def checkpoint_bytes(kept: Iterable[torch.Tensor], trained: Iterable[torch.Tensor], *, ema: bool = False) -> int:
    """Size of one checkpoint folder.

    Args:
        kept: weights that it holds.
        trained: those with a state of the optimizer.
        ema: averaged weights are kept, too.
    """
    weights, trained = list(kept), list(trained)
    named = {f"{index:0>60}": tensor for index, tensor in enumerate(weights)}
    size = safetensors_bytes(named) + optimizer_bytes(trained) + _CHECKPOINT_TEXT_BYTES
    return size + (tensor_bytes(weights) if ema else 0)
