"""The plan of an edit, against a real one."""

from __future__ import annotations

import json

import pytest

from diffusers_ext.nullspace.edit import edit_concept
from diffusers_ext.nullspace.text_only import text_only_linears
from diffusers_ext.planning import plan_run
from diffusers_ext.planning.edit import EditRun
from diffusers_ext.planning.models import ImageShapes, read_base_model
from diffusers_ext.planning.settings import EditPlanSettings
from diffusers_ext.planning.work import trace_work
from examples.digits.check_model import MODEL_DIR, load_pipeline
from tests.planning.real_jobs import measured_peak
from tests.tiny_image_pipelines import tiny_flux_pipeline, tiny_sd3_pipeline

BASE = read_base_model(MODEL_DIR)


def run_of(**changes) -> EditRun:
    return EditRun(ImageShapes(BASE), EditPlanSettings(**changes), as_on_gpu=False)


@pytest.mark.parametrize("hard", [False, True])
def test_solving_allocates_what_was_traced(hard):
    work = run_of(hard=hard).solving_work(128)
    assert trace_work(work).peak == pytest.approx(measured_peak(work), rel=0.25)


def test_the_linears_are_those_that_read_text():
    pipeline = load_pipeline()
    found = run_of().linears()
    assert found.keys() == text_only_linears(pipeline).keys()
    assert found == {name: tuple(pipeline.unet.get_submodule(name).weight.shape) for name in found}


@pytest.mark.parametrize("build", [tiny_flux_pipeline, tiny_sd3_pipeline])
def test_what_embeds_text_is_found_in_transformers(build, tmp_path):
    pipeline = build()
    pipeline.save_pretrained(tmp_path)
    run = EditRun(ImageShapes(read_base_model(tmp_path)), EditPlanSettings(), False)
    assert "context_embedder" in run.linears()
    assert run.linears().keys() <= text_only_linears(pipeline).keys()


def test_the_files_are_as_large_as_planned(tmp_path):
    edit = edit_concept(load_pipeline(), {"three": "nine"}, ["a red three", "a red one"])
    rank = max(row["rank"] for row in edit.report.layers)
    folder = edit.save(tmp_path)
    planned = run_of(rank=rank, num_preserved_prompts=2).disk()
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert planned["LoRA"] == pytest.approx(written, rel=0.1)
    assert planned["report"] == pytest.approx((folder / "edit_report.json").stat().st_size, rel=1)
    assert json.loads((folder / "edit_report.json").read_text())["preserve"]


def test_a_plan_names_memory_and_time():
    plan = plan_run("edit", MODEL_DIR, gpu="RTX 4090", num_preserved_prompts=200)
    assert [phase.name for phase in plan.phases] == ["probing", "reading prompts", "solving"]
    assert 0 < plan.seconds < 5
    assert plan.fits
    assert "Plan: edit with" in plan.table()
    assert any("float64" in words for words in plan.assumptions)
