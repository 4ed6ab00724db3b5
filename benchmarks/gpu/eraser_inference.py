"""Erasers in inference on a GPU: time of calls, graphs of compiled models, models that wait in the host's memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from benchmarks.gpu.device import WEIGHTS, Place, counted, peak_and_seconds
from benchmarks.gpu.eraser_training import RANK, run_of
from benchmarks.gpu.models import COG_2B, COG_5B, WAN, fill, make_pipeline, needed_bytes, weight_bytes
from benchmarks.timing import compare, seconds
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.planning.eraser import EraserRun
from diffusers_ext.planning.work import trace_work
from diffusers_ext.training.eraser.run import add_eraser

ROWS = {COG_2B: 2, WAN: 2, COG_5B: 1}  # of a call; guidance has two a clip
ERASERS = (1, 4)


def erased(model: torch.nn.Module, count: int, rank: int) -> torch.nn.Module:
    """A copy of a transformer with so many erasers, frozen as `load_eraser` leaves them."""
    model = copy.deepcopy(model)
    names = [f"eraser_{index}" for index in range(count)]
    for name in names:
        for parameter in add_eraser(model, EraserTraining(rank=rank), name):
            parameter.data.normal_(std=0.02)
    model.set_adapters(names)
    return model.requires_grad_(False).eval()


def caller(run: EraserRun, model: torch.nn.Module, rows: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """A call of the transformer for one step of drawing."""
    velocity, text = run.velocity(model), run.text(rows, device)
    x_t, t = torch.randn(rows, *run.latents, device=device), torch.full((rows,), 500, device=device)
    return lambda: torch.no_grad()(velocity)(x_t, t, text)


def planned_call(name: str, rows: int, place: Place) -> int:
    """Bytes of a call by the plan, with a second model that has erasers."""
    work = run_of(name, place)._teacher_work(1, rows)
    return needed_bytes(work, trace_work(work), models=2)


def calls(place: Place) -> None:
    """Calls with 1 and 4 erasers against calls without any."""
    for name, rows in ROWS.items():

        def measure(name: str = name, rows: int = rows) -> None:
            run = run_of(name, place)
            plain = fill(run.build("transformer"), place.device)
            bare = caller(run, plain, rows, place.device)
            for count in ERASERS:
                model = erased(plain, count, run.setting.rank)
                ratio = compare(caller(run, model, rows, place.device), bare, place.repeats(2))
                what = f"{name}: call of {counted(rows, 'row')}, {counted(count, 'eraser')}"
                place.tell_ratio(what, ratio, "without erasers")
                del model
                place.free()

        place.within_memory(f"{name}: calls", measure, planned_call(name, rows, place))


def compiled(place: Place) -> None:
    """Graphs of a model of two blocks with erasers, and time of the whole one compiled block by block."""
    _count_graphs(place)
    place.within_memory(f"{COG_2B}: compiled", lambda: _time_compiled(place), planned_call(COG_2B, 1, place))


def _count_graphs(place: Place) -> None:
    """No kernels are made: what is counted is what dynamo sees."""
    run = run_of(COG_2B, place)
    model = fill(run.build("transformer", num_layers=2), place.device)
    model = erased(model, 2, run.setting.rank)
    counter = CompileCounter()
    torch.compiler.reset()
    counters.clear()
    call = caller(run, torch.compile(model, backend=counter), 1, place.device)
    one, both = ["eraser_0"], ["eraser_0", "eraser_1"]
    changes: list[tuple[str, Callable[[], Any]]] = [
        ("1 eraser, first call", lambda: model.set_adapters(one)),
        ("another scale", lambda: model.set_adapters(one, [0.5])),
        ("scale 0", lambda: model.set_adapters(one, [0.0])),
        ("2 erasers", lambda: model.set_adapters(both)),
        ("1 eraser again", lambda: model.set_adapters(one)),
        ("switched off", model.disable_adapters),
        ("switched on again", model.enable_adapters),
    ]
    for what, change in changes:
        change()
        before = counter.frame_count
        call()
        place.tell_count(f"{COG_2B}, 2 blocks: graphs compiled, {what}", counter.frame_count - before)
    breaks = sum(counters["graph_break"].values())
    place.tell_count(f"{COG_2B}, 2 blocks: graph breaks", breaks, "; ".join(counters["graph_break"])[:200])
    torch.compiler.reset()
    place.free()


def _time_compiled(place: Place) -> None:
    """Every block is the same code, so that one graph should serve them all."""
    run = run_of(COG_2B, place)
    plain = fill(run.build("transformer"), place.device)
    for count in (1, 0):
        model = erased(plain, count, run.setting.rank) if count else plain
        call = caller(run, model, 1, place.device)
        eager = min(seconds(call) for _ in range(2))
        torch.compiler.reset()
        counters.clear()
        # A rehearsal has no compiler of kernels.
        backend = {"backend": "eager"} if place.toy else {}
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, **backend)
        first = seconds(call)
        later = min(seconds(call) for _ in range(place.repeats(3)))
        what = f"{COG_2B}: call of 1 row, {counted(count, 'eraser')}, blocks compiled"
        place.tell_time(what, later, eager, "eager")
        place.tell_time(f"{what}, first call", first)
        graphs = counters["stats"]["unique_graphs"]
        place.tell_count(f"{what}: graphs", graphs, f"for {counted(len(model.transformer_blocks), 'block')}")
    torch.compiler.reset()


def offloaded(place: Place) -> None:
    """CogVideoX-2b with an eraser, whole on the GPU and with parts waiting in the host's memory: equal latents?"""
    needs = weight_bytes(COG_2B, place.toy)
    place.within_memory(f"{COG_2B}: CPU offload", lambda: _offload(place), needs, WEIGHTS)


def _offload(place: Place) -> None:
    pipeline = make_pipeline(COG_2B, place.toy, place.device)
    for parameter in add_eraser(pipeline.transformer, EraserTraining(rank=8 if place.toy else RANK), "seven"):
        parameter.data.normal_(std=0.02)
    pipeline.transformer.requires_grad_(False).eval()
    _drawn(pipeline, place)  # so that no way has to load the kernels
    reference = _draw(pipeline, place, "all on the GPU")
    host = torch.device("cpu")
    ways: dict[str, Callable[[], Any]] = {
        "model by model": lambda: pipeline.enable_model_cpu_offload(device=place.device),
        "block by block": lambda: _offload_blocks(pipeline, place.device, host),
    }
    for way, enable in ways.items():
        pipeline.remove_all_hooks()
        pipeline.to(host)
        place.free()
        enable()
        drawn = _draw(pipeline, place, way)
        differ = int((drawn != reference).sum())
        place.tell_count(f"{COG_2B}: latent numbers that differ, {way}", differ, f"of {reference.numel():,}")


def _offload_blocks(pipeline: DiffusionPipeline, device: torch.device, host: torch.device) -> None:
    pipeline.text_encoder.to(device)
    pipeline.vae.to(device)
    pipeline.transformer.enable_group_offload(
        device, host, offload_type="block_level", num_blocks_per_group=1, use_stream=device.type == "cuda"
    )


def _drawn(pipeline: DiffusionPipeline, place: Place) -> torch.Tensor:
    """A clip's latents on the CPU, after two steps."""
    size = run_of(COG_2B, place).setting
    shape = {name: getattr(size, name) for name in ("num_frames", "height", "width")}
    with quiet_run(pipeline):
        clip = pipeline(
            "a red seven moving right",
            num_inference_steps=2,
            max_sequence_length=pipeline.transformer.config.max_text_seq_length,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **shape,
        )
    return clip.frames.cpu()


def _draw(pipeline: DiffusionPipeline, place: Place, way: str) -> torch.Tensor:
    """`_drawn`, of which time and peak are told."""
    before, found = place.allocated() or 0, []
    peak, taken = peak_and_seconds(lambda: found.append(_drawn(pipeline, place)))
    place.tell_time(f"{COG_2B}: latents in 2 steps, {way}", taken)
    place.tell_memory(f"{COG_2B}: latents in 2 steps, {way}: all memory", before + peak)
    return found[0]
