from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from diffusers_ext.nullspace.projector import ProjectedUpdate

IN, OUT, PRESERVED = 12, 5, 4


class Problem:
    """One Linear, preserved inputs, and a loss that pulls on all inputs."""

    def __init__(self, dtype: torch.dtype = torch.float64, bias: bool = False) -> None:
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(IN, OUT, bias=bias, dtype=dtype)
        self.preserved = torch.randn(PRESERVED, IN, dtype=dtype)
        basis = torch.linalg.qr(self.preserved.double().T).Q
        projection = torch.eye(IN, dtype=torch.float64) - basis @ basis.T
        self.projections = {self.linear.weight: projection}
        self.before = self.linear.weight.detach().clone()
        self.inputs = torch.randn(20, IN, dtype=dtype)
        self.targets = torch.randn(20, OUT, dtype=dtype)

    def backward(self) -> torch.Tensor:
        loss = (self.linear(self.inputs) - self.targets).square().mean()
        loss.backward()
        return loss

    def leak(self) -> float:
        """Relative change of the outputs on preserved inputs."""
        change = self.linear.weight.detach() - self.before
        return ((change @ self.preserved.T).norm() / change.norm() / self.preserved.norm()).item()

    def moved(self) -> bool:
        return not self.linear.weight.equal(self.before)


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_stay_in_the_null_space(name):
    problem = Problem()
    optimizer = OPTIMIZERS[name]([problem.linear.weight])
    first = problem.backward().item()
    with ProjectedUpdate(optimizer, problem.projections):
        for _ in range(20):
            optimizer.step()
            optimizer.zero_grad()
            last = problem.backward().item()
    assert problem.leak() < 1e-12
    assert last < 0.9 * first


def test_projecting_the_gradient_would_not_do():
    problem = Problem()
    (weight,) = problem.projections
    optimizer = torch.optim.Adam([weight], lr=0.1)
    problem.backward()
    weight.grad = weight.grad @ problem.projections[weight]
    optimizer.step()
    assert problem.leak() > 1e-2


def test_the_first_step_is_the_projection_of_the_plain_one():
    plain, constrained = Problem(), Problem()
    for problem in (plain, constrained):
        optimizer = OPTIMIZERS["adam"]([problem.linear.weight])
        problem.backward()
        if problem is plain:
            optimizer.step()
            continue
        with ProjectedUpdate(optimizer, problem.projections):
            optimizer.step()
    step = plain.linear.weight.detach() - plain.before
    (projection,) = constrained.projections.values()
    found = constrained.linear.weight.detach() - constrained.before
    torch.testing.assert_close(found, step @ projection)


def test_float32_weights_leave_only_rounding():
    problem = Problem(torch.float32)
    optimizer = OPTIMIZERS["adam"]([problem.linear.weight])
    with ProjectedUpdate(optimizer, problem.projections):
        for _ in range(50):
            problem.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert 0 < problem.leak() < 1e-6


def test_gradients_accumulate_between_steps():
    results = []
    for parts in (1, 2):
        problem = Problem()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
        model, optimizer = accelerator.prepare(problem.linear, torch.optim.Adam([problem.linear.weight], lr=0.1))
        with ProjectedUpdate(optimizer, problem.projections):
            for _ in range(3 * parts):
                with accelerator.accumulate(model):
                    loss = (model(problem.inputs) - problem.targets).square().mean()
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
        assert problem.moved()
        assert problem.leak() < 1e-12
        results.append(problem.linear.weight.detach())
        accelerator.free_memory()
    torch.testing.assert_close(*results)


def test_removal_leaves_the_optimizer_as_it_was():
    problem = Problem()
    optimizer = OPTIMIZERS["adam"]([problem.linear.weight])
    state = dict(vars(optimizer))
    for leave in (lambda u: u.remove(), lambda u: u.__exit__(None, None, None)):
        update = ProjectedUpdate(optimizer, problem.projections)
        assert optimizer._optimizer_step_pre_hooks
        assert optimizer._optimizer_step_post_hooks
        leave(update)
        leave(update)
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(KeyboardInterrupt), ProjectedUpdate(optimizer, problem.projections):
        raise KeyboardInterrupt
    assert vars(optimizer) == state
    assert not optimizer._optimizer_step_pre_hooks
    problem.backward()
    optimizer.step()
    assert problem.leak() > 1e-2  # an ordinary step again


def test_steps_that_a_gradient_scaler_skips_change_nothing():
    problem = Problem(torch.float32)
    optimizer = OPTIMIZERS["adam"]([problem.linear.weight])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with ProjectedUpdate(optimizer, problem.projections):
        for poison in (float("inf"), 0.0):
            loss = (problem.linear(problem.inputs) - problem.targets).square().mean()
            scaler.scale(loss).backward()
            problem.linear.weight.grad[0, 0] += poison
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert problem.moved() == (poison == 0)
    assert problem.leak() < 1e-6


def test_steps_without_gradients_change_nothing():
    problem = Problem()
    optimizer = OPTIMIZERS["adam"]([problem.linear.weight])
    with ProjectedUpdate(optimizer, problem.projections):
        optimizer.step()
    assert not problem.moved()


def test_gradients_made_by_a_closure_inside_the_step_are_projected():
    problem = Problem()
    optimizer = torch.optim.LBFGS([problem.linear.weight], lr=0.1, max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return problem.backward()

    with ProjectedUpdate(optimizer, problem.projections):
        optimizer.step(closure)
    assert problem.moved()
    assert problem.leak() < 1e-12


def test_parameters_without_a_projector_are_refused():
    problem, other = Problem(), torch.nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"must have a projector, got none for one of shape \(2, 3\)"):
        ProjectedUpdate(torch.optim.Adam([problem.linear.weight, other]), problem.projections)
    optimizer = OPTIMIZERS["adam"]([problem.linear.weight])
    with ProjectedUpdate(optimizer, problem.projections):
        optimizer.add_param_group({"params": [other]})
        problem.backward()
        with pytest.raises(ValueError, match="must have a projector, got none"):
            optimizer.step()
    assert not problem.moved()
    assert not optimizer._optimizer_step_pre_hooks


def test_biases_and_wrong_widths_are_refused():
    problem = Problem(bias=True)
    bias, identity = problem.linear.bias, torch.eye(OUT, dtype=torch.float64)
    cases = {
        r"rows of width 5, got shape \(5,\). Biases": {bias: identity},
        r"rows of width 5, got shape \(5, 12\)": {problem.linear.weight: identity},
    }
    for message, projections in cases.items():
        optimizer = torch.optim.Adam(list(projections))
        with pytest.raises(ValueError, match=f"must be a whole matrix with {message}"):
            ProjectedUpdate(optimizer, projections)
        assert not optimizer._optimizer_step_pre_hooks


def test_weight_decay_is_refused_also_later():
    problem = Problem()
    optimizer = torch.optim.AdamW([problem.linear.weight], weight_decay=0.01)
    with pytest.raises(ValueError, match=r"`weight_decay` must be 0 on full weights, got 0.01"):
        ProjectedUpdate(optimizer, problem.projections)
    optimizer.param_groups[0]["weight_decay"] = 0
    with ProjectedUpdate(optimizer, problem.projections):
        problem.backward()
        optimizer.param_groups[0]["weight_decay"] = 0.1
        with pytest.raises(ValueError, match="`weight_decay` must be 0 on full weights, got 0.1"):
            optimizer.step()
    assert not problem.moved()


def test_half_precision_weights_are_refused():
    problem = Problem(torch.bfloat16)
    with pytest.raises(ValueError, match=r"must be in float32, got torch.bfloat16, whose rounding"):
        ProjectedUpdate(torch.optim.Adam([problem.linear.weight]), problem.projections)


def test_wrapped_optimizers_are_unwrapped():
    problem = Problem()
    optimizer = OPTIMIZERS["adam"]([problem.linear.weight])
    with ProjectedUpdate(SimpleNamespace(optimizer=optimizer), problem.projections):
        assert optimizer._optimizer_step_pre_hooks
