from __future__ import annotations

import pytest
import torch
from safetensors.torch import save
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from diffusers_ext.planning.settings import PlannedRun
from diffusers_ext.planning.tracing import (
    OperationTrace,
    checkpoint_bytes,
    fake_tensors,
    fill_with_fake_tensors,
    gpu_autocast,
    safetensors_bytes,
)
from diffusers_ext.planning.work import Precision


def flops_of(trace):
    return sum(operation.flops * count for operation, count in trace.operations.items())


def test_flops_are_those_of_the_flop_counter():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(32, 5))
    inputs = torch.randn(2, 3, 4, 4)
    with FlopCounterMode(display=False) as counter:
        model(inputs).sum().backward()
    with OperationTrace(model.parameters()) as trace:
        model(inputs).sum().backward()
    assert flops_of(trace) == counter.get_total_flops() > 0
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
    assert flops_of(trace) == (2 + 5 * backward) * products


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


@pytest.mark.parametrize(
    ("norm", "shape"), [(torch.nn.LayerNorm(4), (2, 4)), (torch.nn.GroupNorm(2, 4), (2, 4, 3))], ids=["layer", "group"]
)
def test_norms_give_float32_and_products_half_precision(norm, shape):
    model = torch.nn.ModuleDict({"norm": norm, "linear": torch.nn.Linear(4, 4)}).bfloat16()
    with gpu_autocast(model, torch.bfloat16):
        features = model["norm"](torch.randn(shape).bfloat16())
        assert features.dtype == torch.float32
        assert model["linear"](torch.randn(2, 4)).dtype == torch.bfloat16
    torch.testing.assert_close(features.mean(), torch.tensor(0.0), atol=0.05, rtol=0)


def test_float32_is_left_alone():
    model = torch.nn.LayerNorm(4)
    with Precision(torch.float32).autocast(model):
        assert not torch.is_autocast_enabled("cpu")
    assert "forward" not in vars(model)


def test_peak_and_live_bytes():
    with OperationTrace() as trace:
        kept = torch.zeros(100)
        torch.ones(50).add_(1)
        kept.view(10, 10).t()
        assert trace.live == 400
    assert trace.peak == 600


def test_known_tensors_and_their_views_do_not_count():
    known = torch.zeros(10)
    with OperationTrace([known]) as trace:
        known.view(2, 5).t()
        assert trace.peak == 0
        known[:2].clone()
    assert trace.peak == 8


def test_a_backward_pass_is_seen_and_nothing_is_allocated():
    with torch.device("meta"):
        module = torch.nn.Linear(10**6, 10**6)  # 4 TB
    with fake_tensors():
        fill_with_fake_tensors(module)
        with OperationTrace(module.parameters()) as trace:
            module(torch.zeros(1, 10**6)).sum().backward()
    assert 4e12 <= trace.peak < 4.1e12  # the weight's gradient


def test_modules_with_data_are_refused():
    with pytest.raises(ValueError, match="`module` must be on the meta device"):
        fill_with_fake_tensors(torch.nn.Linear(2, 2))


def test_safetensors_to_the_byte():
    tensors = {"b.weight": torch.zeros(3, 5), "a": torch.zeros(7, dtype=torch.float16)}
    assert safetensors_bytes(tensors) == len(save(tensors))
    metadata = {"note": "é and 'quotes'"}
    difference = safetensors_bytes(tensors, metadata) - len(save(tensors, metadata))
    assert abs(difference) <= 8
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    assert safetensors_bytes(meta) == safetensors_bytes(tensors)


def test_averaged_weights_are_in_a_checkpoint():
    weights = [torch.zeros(100, 100)]
    with_ema = checkpoint_bytes(weights, weights, ema=True)
    assert with_ema - checkpoint_bytes(weights, weights) == 4 * 100 * 100


def test_how_many_checkpoints_stay():
    def number(every, limit=None):
        run = PlannedRun(max_train_steps=100, checkpointing_steps=every, checkpoints_total_limit=limit)
        return run.num_checkpoints

    assert [number(None), number(30), number(10, 2)] == [0, 3, 2]
