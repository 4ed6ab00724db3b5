"""Training steps of an eraser on a GPU: peak against the plan, time against the first published description's step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.document_recipe import DocumentRecipe, DocumentTexts, document_loss
from benchmarks.gpu.device import Place, peak_and_seconds, peak_and_time
from benchmarks.gpu.models import COG_2B, COG_5B, WAN, base_model, begin_work, fill
from diffusers_ext.eraser.adapter.outputs import trainable_eraser_parameters
from diffusers_ext.eraser.concept_masks import mask_to_latents
from diffusers_ext.planning.eraser import EraserRun, eraser_run
from diffusers_ext.planning.settings import EraserPlanSettings
from diffusers_ext.planning.work import Work, trace_work

CLIP = {"num_frames": 49, "height": 480, "width": 720}
_TINY_CLIP = {"num_frames": 9, "height": 32, "width": 32}
RANK = 128
_DOCUMENT = "{}: 7-forward step of 1 row"


class PlannedStep(NamedTuple):
    """A training step, and the bytes that the plan has for it."""

    work: Work
    step: int  # beyond the models
    whole: int  # of the phase


def run_of(name: str, place: Place, separate_passes: bool = False) -> EraserRun:
    """A training at 49 x 480 x 720 in bf16 with gradient checkpointing."""
    setting = EraserPlanSettings(
        rank=8 if place.toy else RANK,
        separate_passes=separate_passes,
        gradient_checkpointing=True,
        mixed_precision="bf16",
        **(_TINY_CLIP if place.toy else CLIP),
    )
    return eraser_run(base_model(name, place.toy), setting, place.as_on_gpu)


def planned_step(run: EraserRun) -> PlannedStep:
    """The step of this training and its memory by plan."""
    work, parts = run.training_works()[0], run.parts()
    trace = trace_work(work)
    models = parts["transformer"] + parts["eraser"]
    return PlannedStep(work, trace.peak, models + trace.kept + trace.peak)


def planned_document(run: EraserRun, separate: int) -> int:
    """Bytes of the 7-forward step, of whose passes five are gone back through; `separate` are ours with passes apart.

    A second model is there, and the four other passes keep what checkpoints start from, all at once.
    """
    tokens = math.prod(run.family.token_grid(run.config, run.latents)) + run.family.text_length(run.config)
    checkpoints = 2 * run.config.num_layers * tokens * run.config.num_attention_heads * run.config.attention_head_dim
    return separate + run.parts()["transformer"] + 4 * checkpoints


def document_step(run: EraserRun, place: Place) -> Callable[[], None]:
    """A step of the first published description: seven forward passes of one clip, two whole models."""
    original = fill(run.build("transformer"), place.device)
    student = fill(run.student(), place.device)
    models = [run.velocity(run.precision.prepare(model)) for model in (original, student)]
    optimizer = torch.optim.AdamW(trainable_eraser_parameters(student, "default"))
    text = run.text(3, place.device)
    concept = torch.zeros(1, text.shape[1], dtype=torch.bool)
    concept[:, 1] = True
    texts = DocumentTexts(*(text[row : row + 1] for row in range(3)), token_mask=concept)
    grid = run.family.token_grid(run.config, run.latents)

    def to_latents(mask: torch.Tensor) -> torch.Tensor:
        return mask_to_latents(mask[..., 0].unflatten(1, grid), run.latents)

    def step() -> None:
        x_t = torch.randn(1, *run.latents, device=place.device)
        t = torch.full((1,), 500, device=place.device)
        document_loss(*models, texts, x_t, t, to_latents, DocumentRecipe()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _passes(separate: bool) -> str:
    return "--separate_passes" if separate else "one pass"


def _train(name: str, place: Place) -> None:
    times: dict[bool, float] = {}
    for separate in (True, False):
        what = f"{name}: training step of 2 rows, {_passes(separate)}"
        planned = planned_step(run_of(name, place, separate))

        def measure(separate: bool = separate, what: str = what, planned: PlannedStep = planned) -> None:
            before = place.allocated()
            step = begin_work(planned.work, place.device)
            peak, whole, times[separate] = peak_and_time(place, step, before)
            place.tell_memory(f"{what}: activations", peak, planned.step)
            if whole is not None:
                place.tell_memory(f"{what}: all memory", whole, planned.whole)

        place.within_memory(what, measure, planned.whole)
        if separate:
            document = planned_document(run_of(name, place), planned.whole)

    def measure_document() -> None:
        before = place.allocated()
        step = document_step(run_of(name, place), place)
        kept = place.allocated()
        # One step is enough: kernels are warm, and it takes long.
        peak, time = peak_and_seconds(step)
        if kept is None:
            place.tell_memory(f"{_DOCUMENT.format(name)}: activations", peak)
        else:
            place.tell_memory(f"{_DOCUMENT.format(name)}: all memory", peak + kept - before, document)
        for separate, own in times.items():
            place.tell_time(f"{name}: training step of 2 rows, {_passes(separate)}", own, time, "7-forward step of 1")

    if not place.within_memory(_DOCUMENT.format(name), measure_document, document):
        for separate, own in times.items():
            place.tell_time(f"{name}: training step of 2 rows, {_passes(separate)}", own)


def train_cogvideox_2b(place: Place) -> None:
    """Of CogVideoX-2b."""
    _train(COG_2B, place)


def train_cogvideox_5b(place: Place) -> None:
    """Of CogVideoX-5b."""
    _train(COG_5B, place)


def train_wan(place: Place) -> None:
    """Of Wan 2.1 1.3B."""
    _train(WAN, place)
