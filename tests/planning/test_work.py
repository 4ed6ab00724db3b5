from __future__ import annotations

import torch

from diffusers_ext.planning.tracing import Operation
from diffusers_ext.planning.work import Job, Precision, Work, measured_seconds, trace_work


def linear_work(layers=None, rows=4):
    blocks = layers or 1

    def make(num_layers=blocks):
        with torch.device("meta"):
            blocks = [torch.nn.Linear(16, 16, bias=False) for _ in range(num_layers)]
            model = torch.nn.Sequential(*blocks).requires_grad_(False)

        def begin(device):
            inputs = torch.randn(rows, 16, device=device)
            return lambda: model(inputs)

        return Job([model], begin)

    return Work("activations", 1, make, layers=layers)


def test_a_trace_counts_memory_and_operations():
    trace = trace_work(linear_work())
    assert trace.kept == 4 * 16 * 4
    assert trace.peak == 4 * 16 * 4
    product = Operation(2 * 4 * 16 * 16, 4 * (64 + 256 + 64), torch.float32)
    assert trace.operations[product] == 1


def test_operations_of_many_blocks_are_extrapolated_to_the_number():
    deep, whole = linear_work(layers=12), linear_work(layers=12)
    whole = Work(whole.name, 1, lambda: deep.make(num_layers=12))
    assert trace_work(deep).operations == trace_work(whole).operations


def test_work_is_timed_with_random_weights():
    seen = []

    def make():
        with torch.device("meta"):
            model = torch.nn.BatchNorm1d(4)

        def begin(device):
            seen.append(model.weight.detach().clone())
            return lambda: model(torch.randn(2, 4, device=device))

        return Job([model], begin)

    assert 0 < measured_seconds(Work("norm", 1, make), torch.device("cpu")) < 1
    assert seen[0].isfinite().all()
    assert seen[0].std() > 0


def test_autocast_gives_float32_after_norms_only_as_on_a_gpu():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).bfloat16()
    inputs = torch.randn(2, 4).bfloat16()
    with Precision(torch.bfloat16, as_on_gpu=False).autocast(model):
        assert model(inputs).dtype == torch.bfloat16
    with Precision(torch.bfloat16).autocast(model):
        assert model(inputs).dtype == torch.float32
    with Precision(torch.float32).autocast(model):
        assert not torch.is_autocast_enabled("cpu")
