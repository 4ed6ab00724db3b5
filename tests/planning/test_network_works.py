from __future__ import annotations

import pytest
import torch

from diffusers_ext.planning.golden_noise_setting import GoldenNoiseSetting
from diffusers_ext.planning.image_shapes import ImageShapes
from diffusers_ext.planning.network_works import network_of, network_works, validation_work
from diffusers_ext.planning.published_models import read_base_model
from diffusers_ext.planning.work import Precision, trace_work
from examples.digits.check_model import MODEL_DIR
from tests.planning.real_jobs import measured_peak
from tests.training.noise_runs import STRUCTURES


ON_CPU = Precision(torch.float32, as_on_gpu=False)


def digits():
    return ImageShapes(read_base_model(MODEL_DIR))


def setting_of(network, **changes):
    steps = 3 if network in ("transformer", "rnn") else 1
    return GoldenNoiseSetting(
        network=network,
        num_steps=steps,
        structure=STRUCTURES[network],
        train_batch_size=8,
        max_train_steps=600,
        **changes,
    )


@pytest.mark.parametrize("network", STRUCTURES)
def test_a_training_step_allocates_what_was_traced(network):
    step, _ = network_works(digits(), setting_of(network), ON_CPU)
    trace = trace_work(step)
    assert trace.peak == pytest.approx(measured_peak(step), rel=0.15)
    weights = sum(
        4 * p.numel() for p in network_of(digits(), setting_of(network)).parameters()
        if p.requires_grad
    )  # fmt: skip
    assert trace.kept >= 2 * weights


def test_averaged_weights_and_batches_before_the_step():
    plain, averaged = (
        trace_work(
            network_works(digits(), setting_of("golden_noise_model", use_ema=ema), ON_CPU)[0]
        )
        for ema in (False, True)
    )
    weights = sum(
        4 * p.numel() for p in network_of(digits(), setting_of("golden_noise_model")).parameters()
    )
    assert averaged.kept - plain.kept == weights
    accumulating = setting_of("golden_noise_model", gradient_accumulation_steps=3)
    step, batch = network_works(digits(), accumulating, ON_CPU)
    assert (step.times, batch.times) == (600, 1200)
    assert trace_work(step).kept - plain.kept == weights  # the gradients stay
    assert sum(trace_work(batch).operations.values()) < sum(trace_work(step).operations.values())


def test_validation_of_sequences_rolls_them_out():
    work = validation_work(digits(), setting_of("transformer"), rows=4, times=1)
    forward = validation_work(digits(), setting_of("golden_noise_model"), rows=4, times=1)
    assert trace_work(work).peak == pytest.approx(measured_peak(work), rel=0.15)
    assert trace_work(forward).peak == pytest.approx(measured_peak(forward), rel=0.15)
