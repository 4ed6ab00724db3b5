from __future__ import annotations

import pytest
import torch

from diffusers_ext.nullspace.scope import scoped_linears
from diffusers_ext.nullspace.statistics import TEXT
from diffusers_ext.planning.models import ImageShapes, read_base_model
from diffusers_ext.planning.nullspace import NullSpaceRun
from diffusers_ext.planning.settings import NullSpacePlanSettings
from diffusers_ext.planning.work import trace_work
from examples.digits.check_model import MODEL_DIR
from tests.planning.real_jobs import measured_peak
from tests.tiny_current_pipelines import (
    tiny_flux2_pipeline,
    tiny_qwen_image_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)
from tests.tiny_image_pipelines import tiny_chroma_pipeline, tiny_flux_pipeline, tiny_sd3_pipeline

BASE = read_base_model(MODEL_DIR)


def run_of(**changes):
    return NullSpaceRun(ImageShapes(BASE), NullSpacePlanSettings(**changes), as_on_gpu=False)


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
    step, _ = run_of(**changes).training_works()
    assert trace_work(step).peak == pytest.approx(measured_peak(step), rel=0.15)


def test_denoising_runs_keep_their_statistics():
    run = run_of(features=("q", "attn1.k", "v"))
    work = run.trajectory_work(1)
    trace = trace_work(work)
    assert trace.peak == pytest.approx(measured_peak(work), rel=0.15)
    covered = run.covered(BASE.components["unet"].build())
    assert TEXT in covered.widths
    assert TEXT not in covered.readers
    assert trace.kept >= covered.bytes - 8 * covered.widths[TEXT] ** 2


def trained(**changes):
    """The weights that train, and the run's files, by what is covered."""
    run = run_of(**changes)
    unet, covered = run.trained_denoiser()
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    assert all(weight.dtype == torch.float32 for weight in weights)
    return weights, run.disk(unet, covered), covered


def test_what_trains():
    weights, files, covered = trained(rank=2, mixed_precision="fp16")
    assert {weight.shape[1] for weight in weights} == {2}
    assert len(weights) == len(covered.sources)
    both, *_ = trained(directions="plain", rank=2)
    assert len(both) == 2 * len(weights)
    size = 4 * sum(weight.numel() for weight in both)
    assert size < files["LoRA"] < size + 16 * 1024
    whole, files, _ = trained(full_finetune=True, mixed_precision="fp16")
    assert {tuple(weight.shape) for weight in whole} == {(56, 128), (96, 128)}
    assert "LoRA" not in files
    assert len(trained(layers=(0,))[0]) == 2


JOINT = {
    "flux": tiny_flux_pipeline,
    "flux2": tiny_flux2_pipeline,
    "chroma": tiny_chroma_pipeline,
    "sd3": tiny_sd3_pipeline,
    "qwen_image": tiny_qwen_image_pipeline,
    "z_image": tiny_z_image_pipeline,
    "wan": tiny_wan_pipeline,
}


def groups(keys):
    """The Linears that share a matrix."""
    found = {}
    for name, key in keys.items():
        found.setdefault(key, set()).add(name)
    return sorted(map(sorted, found.values()))


@pytest.mark.parametrize("name", JOINT)
def test_a_joint_model_is_planned_as_it_trains(tmp_path, name):
    pipeline = JOINT[name]()
    pipeline.save_pretrained(tmp_path)
    shapes = ImageShapes(read_base_model(tmp_path), 32, "nullspace")
    run = NullSpaceRun(shapes, NullSpacePlanSettings(scope="all", train_batch_size=1), as_on_gpu=False)
    denoiser, covered = run.trained_denoiser()
    found = scoped_linears(pipeline, "all")
    assert groups(covered.sources) == groups({**found.text, **found.runs})
    assert set(covered.readers.values()) <= set(found.runs)
    parts = run.parts(denoiser, covered)
    phases = run.phases(tuple(parts), covered)
    assert [phase.name for phase in phases] == ["statistics", "encoding", "training"]
    assert not any(part.startswith("text encoder") for part in phases[-1].resident)
    (step,) = phases[-1].traced
    traced = trace_work(step).peak
    if name != "z_image":  # whose tiny table of angles ends before its text
        assert traced == pytest.approx(measured_peak(step), rel=0.25)
