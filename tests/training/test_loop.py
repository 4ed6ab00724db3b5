from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch.utils.data import TensorDataset

from diffusers_ext.core.seeds import step_generator
from diffusers_ext.training.run.checkpoints import Checkpoints
from diffusers_ext.training.run.loop import LoopSettings, TrainingLoop

INPUTS = torch.arange(24.0).reshape(6, 4) / 24


@pytest.fixture(autouse=True)
def _fresh(fresh_accelerator):
    pass


def fit(model, batch, generator):
    """Noisy regression whose random numbers come from the generator."""
    (x,) = batch
    noisy = x + 0.1 * torch.randn(x.shape, generator=generator)
    loss = (model(noisy) - x.sum(1, keepdim=True)).square().mean()
    return {"loss": loss, "half": loss / 2}


def run(loop: TrainingLoop) -> torch.nn.Module:
    """From the same global random numbers, whatever ran before."""
    set_seed(0)
    return loop.run()


class Killed(Exception):
    """Stands for the end of the process."""


def make_loop(tmp_path=None, loss=fit, every=2, kill_at=None, **arguments) -> TrainingLoop:
    """A small loop with everything that has a state."""
    settings = {"max_train_steps": 8, "train_batch_size": 2, "logging_steps": 1}
    settings.update({k: arguments.pop(k) for k in list(arguments) if k in LoopSettings.__annotations__})
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=settings.get("gradient_accumulation_steps", 1))
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    checkpoints = None
    if tmp_path is not None:
        checkpoints = Checkpoints(accelerator, tmp_path, {"data": "inputs"}, every)

    def die(step: int) -> None:
        if step == kill_at:
            raise Killed

    return TrainingLoop(
        accelerator,
        model,
        optimizer,
        TensorDataset(INPUTS),
        loss,
        LoopSettings(**settings),
        lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8),
        ema=EMAModel(model.parameters(), decay=0.9),
        checkpoints=checkpoints,
        callbacks=[(1, die), *arguments.pop("callbacks", [])],
        **arguments,
    )


def state_of(loop: TrainingLoop) -> dict:
    optimizer = loop.optimizer.state_dict()["state"]
    return {
        "weights": [p.detach() for p in loop.accelerator.unwrap_model(loop.model).parameters()],
        "ema": loop.ema.shadow_params,
        "ema steps": loop.ema.optimization_step,
        "moments": [state["exp_avg_sq"] for state in optimizer.values()],
        "rate": loop.lr_scheduler.get_last_lr(),
        "history": loop.history,
    }


def assert_same_state(first: TrainingLoop, second: TrainingLoop) -> None:
    a, b = state_of(first), state_of(second)
    for name in ("weights", "ema", "moments"):
        assert all(torch.equal(x, y) for x, y in zip(a[name], b[name], strict=True)), name
    assert {k: v for k, v in a.items() if k not in ("weights", "ema", "moments")} == {
        k: v for k, v in b.items() if k not in ("weights", "ema", "moments")
    }


def test_it_learns_and_returns_the_plain_model():
    loop = make_loop(max_train_steps=60)
    before = (loop.model(INPUTS) - INPUTS.sum(1, keepdim=True)).square().mean().item()
    model = loop.run()
    assert type(model) is torch.nn.Sequential
    model.eval()
    assert (model(INPUTS) - INPUTS.sum(1, keepdim=True)).square().mean() < before / 4
    assert [row["step"] for row in loop.history] == list(range(1, 61))
    row = loop.history[-1]
    assert row.keys() == {"step", "loss", "half", "lr"}
    assert row["half"] == pytest.approx(row["loss"] / 2)
    assert loop.seconds > 0


def test_logs_are_means_since_the_last_log():
    every, third = make_loop(max_train_steps=7), make_loop(max_train_steps=7, logging_steps=3)
    run(every)
    run(third)
    losses = [row["loss"] for row in every.history]
    assert [row["step"] for row in third.history] == [3, 6, 7]
    expected = [sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]]
    assert [row["loss"] for row in third.history] == pytest.approx(expected)


def test_random_numbers_depend_on_seed_and_micro_step():
    drawn = []

    def record(model, batch, generator):
        drawn.append(torch.rand(3, generator=generator))
        return fit(model, batch, generator)

    settings = {"max_train_steps": 2, "gradient_accumulation_steps": 2, "seed": 5}
    run(make_loop(loss=record, **settings))
    expected = [torch.rand(3, generator=step_generator(5, micro_step)) for micro_step in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))


def test_accumulated_steps_equal_one_large_batch():
    def plain(model, batch, generator):
        return {"loss": (model[2](model[0](batch[0])) - 1).square().mean()}

    large = make_loop(loss=plain, train_batch_size=4)
    models = [run(large)]
    small = make_loop(loss=plain, train_batch_size=2, gradient_accumulation_steps=2)
    models.append(run(small))
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert len(small.history) == 8
    assert small.ema.optimization_step == large.ema.optimization_step == 8


@pytest.mark.parametrize("kill_at", [2, 3, 7])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_killed_loop_resumes_to_the_same_bits(tmp_path, kill_at, accumulation):
    settings = {"gradient_accumulation_steps": accumulation}
    whole = make_loop(tmp_path / "whole", **settings)
    run(whole)
    killed = make_loop(tmp_path / "killed", kill_at=kill_at, **settings)
    with pytest.raises(Killed):
        run(killed)
    torch.randn(100)  # another process has other global random numbers
    resumed = make_loop(tmp_path / "killed", resume_from_checkpoint="latest", **settings)
    resumed.run()
    assert_same_state(whole, resumed)


def test_a_resumed_loop_keeps_the_clock(tmp_path):
    first = make_loop(tmp_path)
    first.run()
    second = make_loop(tmp_path, resume_from_checkpoint="checkpoint-8")
    second.run()
    assert second.seconds > 0.5 * first.seconds
    assert_same_state(first, second)


def test_callbacks_run_every_so_often_at_the_end_and_again_after_a_resume(tmp_path):
    calls = []
    make_loop(tmp_path, callbacks=[(3, calls.append)]).run()
    assert calls == [3, 6, 8]
    calls.clear()
    # A run may be killed between a checkpoint and the calls of its step.
    resume = {"resume_from_checkpoint": "checkpoint-6"}
    make_loop(tmp_path, callbacks=[(3, calls.append)], **resume).run()
    assert calls == [6, 8]


def broken_from(step: int, value: float):
    calls = []

    def loss(model, batch, generator):
        calls.append(None)
        losses = fit(model, batch, generator)
        return losses if len(calls) < step else {"loss": losses["loss"] * value}

    return loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, value):
    loop = make_loop(tmp_path, loss=broken_from(4, value))
    with pytest.raises(FloatingPointError, match="loss must stay finite, got (nan|inf) before step 4"):
        run(loop)
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-2"]
    resumed, whole = make_loop(tmp_path, resume_from_checkpoint="latest"), make_loop()
    resumed.run()
    run(whole)
    assert_same_state(whole, resumed)


def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path):
    def loss(model, batch, generator):
        losses = fit(model, batch, generator)
        zero = model[0].weight.sum() * 0
        return {"loss": losses["loss"] + (zero.abs().sqrt() if len(seen) == 3 else zero)}

    seen = []
    loop = make_loop(tmp_path, loss=loss, callbacks=[(1, seen.append)])
    with pytest.raises(FloatingPointError, match="weights must stay finite.* after step 4"):
        loop.run()
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_checkpoint_from_beyond_the_end_is_refused(tmp_path):
    make_loop(tmp_path).run()
    loop = make_loop(tmp_path, max_train_steps=5, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="`max_train_steps` must be at least the 8 steps .* got 5"):
        loop.run()


def test_the_accelerator_must_accumulate_as_the_loop_does():
    loop = make_loop()
    loop.accelerator.gradient_accumulation_steps = 4
    with pytest.raises(ValueError, match="`gradient_accumulation_steps` must be the same .* 4 and 1"):
        loop.run()


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_train_steps", 0, "at least 1, got 0"),
        ("train_batch_size", 0, "at least 1, got 0"),
        ("gradient_accumulation_steps", -1, "at least 1, got -1"),
        ("logging_steps", 0, "at least 1, got 0"),
        ("max_grad_norm", 0.0, "positive, got 0.0"),
        ("max_grad_norm", float("nan"), "positive, got nan"),
    ],
)
def test_wrong_settings(name, value, rule):
    with pytest.raises(ValueError, match=f"`{name}` must be {rule}"):
        LoopSettings(**{"max_train_steps": 1, name: value})
