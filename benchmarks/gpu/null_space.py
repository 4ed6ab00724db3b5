"""Null-space DreamBooth on a GPU: training steps, feature statistics, edits in closed form."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

from benchmarks.gpu.device import WEIGHTS, Place, counted, peak_and_seconds
from benchmarks.gpu.models import (
    KLEIN,
    PROMPTS,
    SD15,
    SDXL,
    base_model,
    begin_work,
    make_pipeline,
    needed_bytes,
    weight_bytes,
)
from benchmarks.measured_memory import peak_bytes
from benchmarks.timing import compare, seconds
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.nullspace.collect import collect_statistics, encode_text, text_moment
from diffusers_ext.nullspace.edit import edit_concept
from diffusers_ext.planning.models import ImageShapes
from diffusers_ext.planning.nullspace import NullSpaceRun
from diffusers_ext.planning.settings import NullSpacePlanSettings
from diffusers_ext.planning.work import Work, WorkTrace, trace_work

FEATURES = ("q", "out")
RANK = 8
BATCHES = {SD15: 8, SDXL: 2}  # pictures of a training step
TEXTS, RUN_PROMPTS, RUN_STEPS = 192, 8, 4  # of k/v statistics; of runs for q/out ones
PRESERVED = {SDXL: 200, KLEIN: 8}  # a prompt of FLUX.2 has 512 tokens, one of SDXL 77


def step_work(name: str, place: Place, directions: str) -> Work:
    """A training step as the library plans and makes it, in bf16."""
    shapes = ImageShapes(base_model(name, place.toy), None, "nullspace")
    setting = NullSpacePlanSettings(
        directions=directions,
        rank=RANK,
        resolution=shapes.resolution,
        train_batch_size=1 if place.toy else BATCHES[name],
        mixed_precision="bf16",
    )
    return NullSpaceRun(shapes, setting, place.as_on_gpu).training_works()[0]


def training_steps(place: Place) -> None:
    """Null-space steps against plain LoRA steps of the same rank, and their peak against the plan."""
    for name in BATCHES:
        works = [step_work(name, place, directions) for directions in ("generalized", "plain")]
        planned = trace_work(works[0])

        def measure(name: str = name, works: list[Work] = works, planned: WorkTrace = planned) -> None:
            _training_steps(name, works, planned, place)

        place.within_memory(f"{name}: training steps", measure, needed_bytes(works[0], planned, models=2))


def _training_steps(name: str, works: list[Work], planned: WorkTrace, place: Place) -> None:
    null_space, plain = (begin_work(work, place.device) for work in works)
    ratio = compare(null_space, plain, place.repeats(10))
    place.tell_ratio(f"{name}: null-space step", ratio, "plain LoRA step")
    place.tell_memory(f"{name}: activations of a null-space step", peak_bytes(null_space), planned.peak)


def statistics(place: Place) -> None:
    """What feature statistics add to the bare work that they are read from."""
    for name in BATCHES:
        needs = weight_bytes(name, place.toy)
        place.within_memory(f"{name}: statistics", lambda name=name: _statistics(name, place), needs, WEIGHTS)


def _statistics(name: str, place: Place) -> None:
    pipeline = make_pipeline(name, place.toy, place.device)
    texts = (PROMPTS * 4)[: place.repeats(TEXTS)]

    def encode() -> None:
        for start in range(0, len(texts), 64):
            encode_text(pipeline, texts[start : start + 64])

    ratio = compare(lambda: text_moment(pipeline, texts, batch_size=64), encode, place.repeats(5))
    place.tell_ratio(f"{name}: k/v statistics of {counted(len(texts), 'prompt')}", ratio, "text encoders alone")
    _run_statistics(name, pipeline, place)


def _run_statistics(name: str, pipeline: DiffusionPipeline, place: Place) -> None:
    run = {"num_inference_steps": place.repeats(RUN_STEPS), "guidance_scale": 5.0}
    prompts = ["", *PROMPTS][: place.repeats(RUN_PROMPTS) + 1]

    def denoise() -> None:
        with quiet_run(pipeline):
            seeds = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
            negative = [""] * len(prompts)
            pipeline(prompts, negative_prompt=negative, generator=seeds, output_type="latent", **run)

    def collect(precision: str) -> None:
        options = {"features": FEATURES, "batch_size": len(prompts), "gram_precision": precision}
        collect_statistics(pipeline, prompts[1:], show_progress=False, expand_sub_phrases=False, **options, **run)

    for precision in ("float32", "bf16x3"):
        ratio = compare(lambda precision=precision: collect(precision), denoise, place.repeats(2))
        what = f"{name}: q/out statistics along runs, Gram matrices in {precision}"
        place.tell_ratio(what, ratio, "bare runs")


def edits(place: Place) -> None:
    """One edit in closed form of whole models, text encoders included."""
    for name, count in PRESERVED.items():
        needs = weight_bytes(name, place.toy)
        place.within_memory(f"{name}: edit", lambda name=name, count=count: _edit(name, count, place), needs, WEIGHTS)


def _edit(name: str, count: int, place: Place) -> None:
    pipeline = make_pipeline(name, place.toy, place.device)
    preserved = [prompt for prompt in PROMPTS if "three" not in prompt][: 1 if place.toy else count]
    found = []

    def edit() -> None:
        found.append(edit_concept(pipeline, {"three": "nine"}, preserved, batch_size=32).report)

    peak, first = peak_and_seconds(edit)
    again = first if place.toy else seconds(edit)
    report = found[-1]
    what = f"{name}: edit of {counted(len(report.layers), 'Linear')}, {report.preserved_prompts} preserved prompts"
    place.tell_time(what, again, first, "the first one")
    place.tell_memory(f"{name}: memory of the edit beside the model", peak)
