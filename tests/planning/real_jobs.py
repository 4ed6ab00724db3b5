"""Works of a plan, run with data for once."""

from __future__ import annotations

import torch

from benchmarks.measured_memory import peak_bytes
from diffusers_ext.planning.tracing import move_other_tensors
from diffusers_ext.planning.work import Work


def measured_peak(work: Work) -> int:
    """Bytes of one repetition on the CPU beyond the modules and what is kept, as the allocator saw it."""
    modules, begin = work.make()
    for module in modules:
        module.to_empty(device="cpu")
        move_other_tensors(module, torch.device("cpu"))
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data.normal_(std=0.02) if tensor.is_floating_point() else tensor.data.zero_()
    repeat = begin(torch.device("cpu"))
    repeat()
    return peak_bytes(repeat)
