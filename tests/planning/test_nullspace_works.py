from __future__ import annotations

import pytest
import torch

from diffusers_ext.nullspace.statistics import TEXT
from diffusers_ext.planning.image_shapes import ImageShapes
from diffusers_ext.planning.nullspace_setting import NullSpaceSetting
from diffusers_ext.planning.nullspace_unet import covered_linears, lora_tensors, trained_unet
from diffusers_ext.planning.nullspace_works import nullspace_training, trajectory_work
from diffusers_ext.planning.published_models import read_base_model
from diffusers_ext.planning.work import Precision, trace_work
from examples.digits.check_model import MODEL_DIR
from tests.planning.real_jobs import measured_peak


ON_CPU = Precision(torch.float32, as_on_gpu=False)
BASE = read_base_model(MODEL_DIR)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"full_finetune": True},
        {"directions": "soft", "rank": 4},
        {"features": ("q", "k", "v", "out"), "with_prior_preservation": True},
    ],
    ids=["checkpointing", "whole weights", "soft", "prior"],
)
def test_a_training_step_allocates_what_was_traced(changes):
    step, _ = nullspace_training(ImageShapes(BASE), NullSpaceSetting(**changes), ON_CPU)
    assert trace_work(step).peak == pytest.approx(measured_peak(step), rel=0.15)


def test_denoising_runs_keep_their_statistics():
    setting = NullSpaceSetting(features=("q", "attn1.k", "v"))
    work = trajectory_work(ImageShapes(BASE), setting, 1, ON_CPU)
    trace = trace_work(work)
    assert trace.peak == pytest.approx(measured_peak(work), rel=0.15)
    covered = covered_linears(BASE.components["unet"].build(), setting)
    assert TEXT in covered.widths
    assert TEXT not in covered.readers
    assert trace.kept >= covered.bytes - 8 * covered.widths[TEXT] ** 2


def test_what_trains():
    unet, trained, covered = trained_unet(BASE, NullSpaceSetting(rank=2), torch.float16)
    assert {parameter.shape[1] for parameter in trained} == {2}
    assert len(lora_tensors(unet)) == 2 * len(covered.sources) == 2 * len(trained)
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    both = trained_unet(BASE, NullSpaceSetting(directions="plain"), torch.float32)[1]
    assert len(both) == 2 * len(trained)
    whole = trained_unet(BASE, NullSpaceSetting(full_finetune=True), torch.float16)[1]
    assert {tuple(weight.shape) for weight in whole} == {(56, 128), (96, 128)}
    assert all(weight.dtype == torch.float32 for weight in whole)
    some = trained_unet(BASE, NullSpaceSetting(layers=(0,)), torch.float32)[1]
    assert len(some) == 2
