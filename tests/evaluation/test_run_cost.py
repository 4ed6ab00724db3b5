from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_ext.evaluation.noise_summary import Measurement, RunCost


@pytest.fixture
def cost() -> RunCost:
    return RunCost(torch.device("cpu"))


def test_the_first_and_smaller_batches_do_not_count(cost):
    times = [(4, 40.0), (4, 4.0), (4, 8.0), (4, 400.0), (1, 90.0)]
    cost.measurements["draw"] = [Measurement(*found, None) for found in times]
    assert cost.seconds("draw") == 2
    cost.measurements["draw"] = [Measurement(4, 8.0, None), Measurement(1, 1.0, None)]
    assert cost.seconds("draw") == 1.5


def test_a_block_is_timed(cost):
    for _ in range(2):
        with cost.measure("sleep", 2):
            time.sleep(0.02)
    assert 0.01 <= cost.seconds("sleep") < 60


def test_memory_is_what_the_largest_resident_set_grew_by(cost):
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # More than what other tests have used and given back.
    size = 2**28 + max(0, largest - pages * resource.getpagesize())
    with cost.measure("nothing", 1):
        pass
    with cost.measure("much", 1):
        np.ones(size, dtype=np.uint8)
    with cost.measure("again", 1):
        np.ones(size // 2, dtype=np.uint8)
    assert cost.peak_memory("nothing") < size // 8
    assert cost.peak_memory("much") > 0
    assert cost.peak_memory("again") < size // 8


def test_an_exception_is_no_measurement(cost):
    with pytest.raises(RuntimeError, match="stop"), cost.measure("draw", 1):
        raise RuntimeError("stop")
    assert not cost.measurements


def test_unknown_memory_is_none(cost):
    cost.measurements["draw"] = [Measurement(1, 1.0, None)]
    assert cost.peak_memory("draw") is None
