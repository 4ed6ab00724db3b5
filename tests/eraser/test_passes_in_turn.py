from __future__ import annotations

import pytest
import torch

from diffusers_ext.eraser.step import run_separately
from diffusers_ext.planning.tracing import MemoryTrace


def make_passes(weight, calls, *, count=3, depth=20):
    def one(number):
        calls.append(number)
        features = torch.full((64, 64), float(number + 1))
        for _ in range(depth):
            features = torch.dropout(torch.tanh(features @ weight), 0.2, train=True)
        return features.sum()

    return [lambda number=number: one(number) for number in range(count)]


def test_results_gradients_and_random_numbers_are_those_of_plain_calls():
    found = []
    for run in (run_separately, lambda passes: [one() for one in passes]):
        torch.manual_seed(0)
        weight, calls = torch.full((64, 64), 0.01, requires_grad=True), []
        results = run(make_passes(weight, calls))
        sum(results).backward()
        found.append((torch.stack(results).detach(), weight.grad))
        after = torch.rand(1)
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain)
    torch.manual_seed(0)
    [one() for one in make_passes(weight, [])]
    assert torch.equal(torch.rand(1), after)


def test_all_but_the_last_run_again_in_the_backward_pass_the_latest_first():
    weight, calls = torch.full((64, 64), 0.01, requires_grad=True), []
    results = run_separately(make_passes(weight, calls))
    assert calls == [0, 1, 2]
    sum(results).backward()
    assert calls == [0, 1, 2, 1, 0]


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_passes_takes_the_memory_of_one(count):
    weight, peaks = torch.full((64, 64), 0.01, requires_grad=True), []
    for number in (1, count):
        weight.grad = None
        with MemoryTrace([weight]) as trace:
            sum(run_separately(make_passes(weight, [], count=number))).backward()
        peaks.append(trace.peak)
    assert peaks[1] < 1.2 * peaks[0]


def test_no_passes():
    assert run_separately([]) == []
