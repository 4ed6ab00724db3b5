"""A guard's training by plan, beside what its steps allocate."""

from __future__ import annotations

import pytest

from diffusers_ext.planning import plan_run
from diffusers_ext.planning.models import ImageShapes, read_base_model
from diffusers_ext.planning.noise_guard import GuardRun
from diffusers_ext.planning.settings import GuardPlanSettings
from diffusers_ext.planning.work import trace_work
from examples.digits.check_model import MODEL_DIR
from tests.planning.real_jobs import measured_peak
from tests.training.noise_runs import STRUCTURES


def run_of(**changes):
    chosen = {"structure": STRUCTURES["golden_noise_model"], "num_prompts": 20, "reward": "another", **changes}
    return GuardRun(ImageShapes(read_base_model(MODEL_DIR)), GuardPlanSettings(**chosen), as_on_gpu=False)


def test_steps_allocate_what_was_traced(subtests):
    run = run_of()
    works = {"training": run.training_works()[0], "validation": run.validation_work(32, 1)}
    works |= {work.name: work for work in run._reading_works()}
    for name, work in works.items():
        with subtests.test(name=name):
            assert trace_work(work).peak == pytest.approx(measured_peak(work), rel=0.15)
    weights = sum(4 * p.numel() for p in run.guard().parameters())
    assert trace_work(works["training"]).kept == pytest.approx(2 * weights, rel=0.15)  # and a batch


def test_phases_are_those_that_the_settings_ask_for():
    phases = {phase.name: phase for phase in run_of().phases(("unet", "vae", "text encoder"), ("judge",))}
    assert list(phases) == ["judging", "encoding text", "reading", "training", "validation"]
    assert "judge" in phases["judging"].resident
    assert "unet" not in phases["training"].resident
    read = run_of(judged=True, reads="noise")
    phases = {phase.name: phase for phase in read.phases(("unet", "vae", "text encoder"), ())}
    assert list(phases) == ["encoding text", "reading", "training", "validation"]
    assert "unet" not in phases["reading"].resident
    assert [work.name for work in phases["reading"].works] == ["network's activations"]
    assert "gains" not in read.disk()


@pytest.mark.parametrize("network", ["npnet", "transformer", "rnn"])
def test_every_network_can_be_guarded(network):
    steps = 1 if network == "npnet" else 3
    work = run_of(network=network, num_steps=steps, structure=STRUCTURES[network])._refining_work(4, 1)
    # Of the RNN's layers, whose forward pass is one operation, what is made inside is not seen.
    assert trace_work(work).peak == pytest.approx(measured_peak(work), rel=0.25 if network == "rnn" else 0.15)


def test_what_a_guard_cannot_be_trained_with_is_refused():
    for wrong, message in (
        ({"reward": None}, "`reward` must be given unless the noises are `judged`, got none"),
        ({"validation_split": 0}, r"`validation_split` must be in \(0, 1\), got 0"),
        ({"reads": "text"}, "`reads` must be one of"),
        ({"network": "rnn"}, "`num_steps` must be at least 2 for the rnn"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_run("guard", MODEL_DIR, **wrong)
    GuardPlanSettings(reward=None, judged=True)
