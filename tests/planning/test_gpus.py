from __future__ import annotations

from collections import Counter

import pytest
import torch

from diffusers_ext.planning.gpus import (
    BANDWIDTH_UTILIZATION,
    GPUS,
    LAUNCH_SECONDS,
    MATMUL_UTILIZATION,
    Gpu,
    find_gpu,
    gpu_seconds,
)
from diffusers_ext.planning.tracing import Operation

CARD = Gpu("test", 8, half_tflops=100.0, float32_tflops=10.0, bandwidth=100.0)


def test_gpus_by_any_spelling():
    for name, expected in (
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("a100-80", "A100 80GB"),
        ("A10G", "A10G"),
        ("rtx 4060 ti", "RTX 4060 Ti 16GB"),
        ("H100", "H100"),
    ):
        assert find_gpu(name).name == expected
    assert all(find_gpu(gpu.name) == gpu for gpu in GPUS)


def test_unknown_and_ambiguous_gpus():
    with pytest.raises(ValueError, match="`gpu` must be .* got 'RTX 1060'"):
        find_gpu("RTX 1060")
    with pytest.raises(ValueError, match="got 'A100', which are .*A100 40GB.*A100 80GB"):
        find_gpu("A100")
    with pytest.raises(ValueError, match="got ''"):
        find_gpu("")


def test_rates_by_dtype():
    t4, a100 = find_gpu("T4"), find_gpu("A100 80GB")
    assert a100.flops(torch.bfloat16) == 312e12
    assert a100.flops(torch.float32) == 19.5e12
    assert a100.flops(torch.float32, convolution=True) == 156e12
    assert t4.flops(torch.float16) == 65e12
    assert t4.flops(torch.bfloat16) == t4.flops(torch.float32, convolution=True) == 8.1e12


def test_time_on_a_card_is_the_longest_of_arithmetic_traffic_and_launch():
    flops = Operation(10**12, 8, torch.float16)
    traffic = Operation(0, 10**9, torch.float32)
    launch = Operation(0, 8, torch.float32)
    seconds = gpu_seconds(Counter({flops: 2, traffic: 3, launch: 4}), CARD)
    expected = 2 * 0.01 / MATMUL_UTILIZATION + 3 * 0.01 / BANDWIDTH_UTILIZATION
    assert seconds == pytest.approx(expected + 4 * LAUNCH_SECONDS)
