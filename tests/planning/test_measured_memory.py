"""The measure that plans are compared with."""

from __future__ import annotations

import gc

import pytest
import torch

from benchmarks.measured_memory import peak_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU's profiler")
def test_what_an_earlier_measurement_left_does_not_lower_the_peak():
    class Cycle:
        def __init__(self) -> None:
            self.own, self.tensor = self, torch.zeros(3_000_000)

    def work() -> None:
        gc.collect()
        torch.zeros(5_000_000)

    gc.disable()
    try:
        peak_bytes(Cycle)
        assert peak_bytes(work) == 20_000_000
    finally:
        gc.enable()
