from __future__ import annotations

import pytest

from diffusers_ext.planning import plan_run
from diffusers_ext.planning.golden_noise import GoldenNoiseRun
from diffusers_ext.planning.models import ImageShapes, read_base_model
from diffusers_ext.planning.settings import GoldenNoisePlanSettings
from diffusers_ext.planning.work import trace_work
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
