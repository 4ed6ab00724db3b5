from __future__ import annotations

import pytest

from diffusers_ext.planning import plan_run
from diffusers_ext.planning.golden_noise import GoldenNoiseRun
from diffusers_ext.planning.golden_noise_targets import target_works
from diffusers_ext.planning.models import ImageShapes, read_base_model
from diffusers_ext.planning.settings import OBJECTIVES, TARGETS, GoldenNoisePlanSettings
from diffusers_ext.planning.work import trace_work
from diffusers_ext.training.golden_noise import settings as scripts
from examples.digits.check_model import MODEL_DIR
from tests.golden_noise.golden_pipelines import FAMILIES
from tests.planning.real_jobs import measured_peak
from tests.training.noise_runs import STRUCTURES


def run_of(network, **changes):
    steps = 3 if network in ("transformer", "rnn") else 1
    setting = GoldenNoisePlanSettings(
        network=network,
        num_steps=steps,
        structure=STRUCTURES[network],
        train_batch_size=8,
        max_train_steps=600,
        **changes,
    )
    return GoldenNoiseRun(ImageShapes(read_base_model(MODEL_DIR)), setting, as_on_gpu=False)


def test_low_bands_are_planned_by_the_structure():
    run = run_of("golden_noise_model")
    full = trace_work(run.training_works()[0])
    run.setting.structure = {**run.setting.structure, "bands": 2}
    assert run.network().config.bands == 2
    assert trace_work(run.training_works()[0]).peak < full.peak


@pytest.mark.parametrize("network", STRUCTURES)
def test_a_training_step_allocates_what_was_traced(network):
    run = run_of(network)
    step, _ = run.training_works()
    trace = trace_work(step)
    assert trace.peak == pytest.approx(measured_peak(step), rel=0.15)
    weights = sum(4 * p.numel() for p in run.network().parameters() if p.requires_grad)
    assert trace.kept >= 2 * weights


def test_averaged_weights_and_batches_before_the_step():
    plain, averaged = (
        trace_work(run_of("golden_noise_model", use_ema=ema).training_works()[0]) for ema in (False, True)
    )
    weights = sum(4 * p.numel() for p in run_of("golden_noise_model").network().parameters())
    assert averaged.kept - plain.kept == weights
    accumulating = run_of("golden_noise_model", gradient_accumulation_steps=3)
    step, batch = accumulating.training_works()
    assert (step.times, batch.times) == (600, 1200)
    assert trace_work(step).kept - plain.kept == weights  # the gradients stay
    assert sum(trace_work(batch).operations.values()) < sum(trace_work(step).operations.values())


def test_validation_of_sequences_rolls_them_out():
    work = run_of("transformer").validation_work(rows=4, times=1)
    forward = run_of("golden_noise_model").validation_work(rows=4, times=1)
    assert trace_work(work).peak == pytest.approx(measured_peak(work), rel=0.15)
    assert trace_work(forward).peak == pytest.approx(measured_peak(forward), rel=0.15)


@pytest.mark.parametrize("family", ["flux2_dev", "z_image"])
def test_models_with_the_text_of_large_language_models_are_planned(family, tmp_path):
    FAMILIES[family].plain().save_pretrained(tmp_path)
    setting = {"num_prompts": 4, "output_size": 32, "train_batch_size": 2, "structure": {"num_layers": 1}}
    plan = plan_run("golden-noise", tmp_path, reward="another", **setting)
    assert [phase.name for phase in plan.phases] == [
        "re-denoising", "judging", "encoding text", "training", "validation",
    ]  # fmt: skip
    assert all(phase.peak > 0 for phase in plan.phases)
    longest = any("Every text is as long as the longest, 512 tokens" in note for note in plan.assumptions)
    assert longest == (family == "z_image")
    if longest:
        with pytest.raises(ValueError, match="must be none of NPNet for"):
            plan_run("golden-noise", tmp_path, num_prompts=4, output_size=32, network="npnet")


DRAWN = {"num_prompts": 20, "num_inference_steps": 2, "guidance_scale": 1.0, "reward": "another", "batch_size": 4}


@pytest.mark.parametrize("target", TARGETS)
def test_what_makes_pairs_by_a_target_allocates_what_was_traced(target):
    run = run_of("golden_noise_model", **DRAWN, target=target)
    works = target_works(run.shapes, run.setting, 4, 5, run.precision)
    calls = {"guidance": [5], "reward": [50, 10, 20], "best_of_n": [80, 160], "diversity": [50, 50]}[target]
    assert [work.times for work in works] == calls
    work = works[0]
    assert trace_work(work).peak == pytest.approx(measured_peak(work), rel=0.15)


def test_steps_without_a_gradient_take_less_memory():
    every, one = (
        target_works(run.shapes, run.setting, 4, 5, run.precision)
        for run in (run_of("golden_noise_model", **DRAWN, target="reward", gradient_steps=n) for n in (None, 1))
    )
    assert trace_work(one[0]).peak < trace_work(every[0]).peak
    assert len(one) == len(every) + 1


def test_training_by_a_reward_holds_network_and_sampler():
    run = run_of("golden_noise_model", **DRAWN, objective="reward")
    step, _ = run.training_works()
    trace = trace_work(step)
    assert trace.peak == pytest.approx(measured_peak(step), rel=0.15)
    pairs = run_of("golden_noise_model", **DRAWN)
    assert trace.peak > trace_work(pairs.training_works()[0]).peak
    assert trace.kept >= trace_work(pairs.training_works()[0]).kept
    phases = {phase.name: phase for phase in run.phases(("unet", "vae"))}
    assert list(phases) == ["encoding text", "training", "validation"]
    assert {"unet", "vae"} < set(phases["training"].resident)
    assert "pairs" not in run.disk(run.network())
    assert run.setting.candidates == 160


def test_targets_are_those_of_the_scripts_and_need_their_reward():
    assert (TARGETS, OBJECTIVES) == (scripts.TARGETS, scripts.OBJECTIVES)
    for wrong in ({"target": "reward"}, {"target": "best_of_n"}, {"objective": "reward"}):
        with pytest.raises(ValueError, match="`reward` must be given for an objective or a target"):
            GoldenNoisePlanSettings(**wrong, reward=None)
    GoldenNoisePlanSettings(target="diversity", reward=None)
    with pytest.raises(ValueError, match="`objective` must be 'pairs' for the rnn"):
        GoldenNoisePlanSettings(objective="reward", network="rnn", num_steps=3)
