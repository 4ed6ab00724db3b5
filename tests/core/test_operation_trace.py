from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from diffusers_ext.core.tracing import OperationTrace, fake_tensors


def test_flops_are_those_of_the_flop_counter():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(32, 5)
    )
    inputs = torch.randn(2, 3, 4, 4)
    with FlopCounterMode(display=False) as counter:
        model(inputs).sum().backward()
    with OperationTrace(model.parameters()) as trace:
        model(inputs).sum().backward()
    assert trace.flops == counter.get_total_flops() > 0
    assert any(operation.convolution for operation in trace.operations)


@pytest.mark.parametrize("backward", [False, True])
def test_attention_on_the_cpu_is_counted(backward):
    rows, heads, tokens, dim = 2, 3, 10, 8
    query = torch.randn(rows, heads, tokens, dim, requires_grad=True)
    with OperationTrace() as trace:
        output = functional.scaled_dot_product_attention(query, query, query)
        if backward:
            output.sum().backward()
    products = rows * heads * tokens * tokens * dim * 2
    assert trace.flops == (2 + 5 * backward) * products


def test_views_are_no_operations_and_traffic_is_what_is_read_and_written():
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    with OperationTrace([x, y]) as trace:
        x.view(32).unsqueeze(0)
        assert not trace.operations
        x + y
    assert {(o.flops, o.bytes) for o in trace.operations} == {(0, 3 * 4 * 32)}
    trace.reset()
    assert not trace.operations
    assert trace.peak == trace.live


def test_numbers_read_from_tensors_without_data():
    with fake_tensors(), OperationTrace():
        x = torch.empty(3)
        assert bool((x > 0).all()) is True
        assert x.sum().item() == 1
