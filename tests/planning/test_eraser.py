from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import WanPipeline

from benchmarks.measured_memory import peak_bytes
from diffusers_ext.eraser.adapter.config import eraser_size
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.teacher.collect import collect_teacher_samples
from diffusers_ext.eraser.teacher.runs import EraserText
from diffusers_ext.planning import plan_run
from diffusers_ext.planning.eraser import draft_eraser, eraser_run
from diffusers_ext.planning.gpus import find_gpu, gpu_seconds
from diffusers_ext.planning.models import read_base_model, read_folder
from diffusers_ext.planning.settings import EraserPlanSettings
from diffusers_ext.planning.tracing import OperationTrace
from diffusers_ext.planning.work import trace_work
from diffusers_ext.training.eraser.data import ClipSize
from diffusers_ext.training.eraser.run import EraserData, add_eraser, make_step
from tests.planning.real_jobs import measured_peak
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.tiny_current_pipelines import tiny_wan_pipeline
from tests.tiny_hunyuan_video import tiny_hunyuan_video_pipeline

LATENTS = (3, 4, 4, 4)
SMALL = {"rank": 8, "mixed_precision": "no", "gradient_checkpointing": False}
SMALL |= {"points_per_trajectory": 2, "num_target_trajectories": 5, "num_preserved_trajectories": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_video_pipeline(num_attention_heads=4, num_layers=4).save_pretrained(path)
    return path


def works_of(folder, name, **setting):
    draft = draft_eraser(read_folder(folder), EraserPlanSettings(**{**SMALL, **setting}))
    return next([*p.works, *p.untimed] for p in draft.phases if p.name == name)


def training_step(rows, checkpointing, localization, in_turn, kind="gelu"):
    """The step of the training script, over random samples."""
    pipeline = tiny_video_pipeline(num_attention_heads=4, num_layers=4)
    recipe = EraserTraining(
        rank=8,
        kind=kind,
        train_batch_size=rows,
        localization_weight=1.0 if localization else 0.0,
        separate_passes=in_turn,
    )
    config = pipeline.transformer.config
    text = torch.randn(3, config.max_text_seq_length, config.text_embed_dim)
    data = EraserData(EraserText(text, text, text, text[0]), None, None, ClipSize(9, 16, 16))
    parameters = add_eraser(pipeline.transformer, recipe)
    if checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    pipeline.transformer.train()
    step = make_step(pipeline, data, recipe, torch.device("cpu"))
    optimizer = torch.optim.AdamW(parameters)
    prompts, t = torch.arange(rows) % 3, torch.arange(rows) * 9
    latents = partial(torch.randn, rows, *LATENTS)

    def run():
        target = {"x_t": latents(), "t": t, "prompt": prompts}
        target |= {"v_concept": latents(), "v_anchor": latents()}
        if localization:
            target["mask"] = torch.rand(rows, *LATENTS[:1], *LATENTS[2:])
        preserved = {"x_t": latents(), "t": t, "prompt": prompts, "velocity": latents()}
        batch = {"target": target, "preserved": preserved}
        step(pipeline.transformer, batch, torch.Generator())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("localization", "in_turn"), [(False, False), (True, False), (True, True)])
def test_the_traced_peak_is_what_the_training_step_allocates(folder, checkpointing, localization, in_turn):
    rows = {"target_rows": 4, "preserved_rows": 4}
    setting = {"localization": localization, "separate_passes": in_turn, **rows}
    setting["gradient_checkpointing"] = checkpointing
    step, _ = works_of(folder, "training", **setting)
    run = training_step(4, checkpointing, localization, in_turn)
    run()  # the optimizer makes its state
    assert trace_work(step).peak == pytest.approx(peak_bytes(run), rel=0.15)


@pytest.mark.parametrize(("phase", "index"), [("text", 0), ("sampling", 0), ("encoding", -1), ("validation", 1)])
def test_frozen_models_take_what_was_traced(folder, phase, index):
    setting = {"text_batch_size": 64, "sampling_batch_size": 8, "validation": True}
    if phase == "encoding":
        setting["latents_source"] = "video"
    work = works_of(folder, phase, **setting)[index]
    trace, measured = trace_work(work), measured_peak(work)
    if "VAE" in work.name:
        # Not what is measured: the CPU's convolutions unfold their input, which a GPU's need not.
        (vae,), begin = work.make()
        vae.to_empty(device="cpu")
        repeat = begin(torch.device("cpu"))
        with OperationTrace([*vae.parameters(), *vae.buffers()]) as real:
            repeat()
        # What is given counts here if anything looks at a part of it.
        assert 0.95 * trace.peak < real.peak < 1.05 * (trace.kept + trace.peak)
        assert trace.peak < measured
    else:
        assert trace.peak == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_few_blocks_tell_of_many(folder, checkpointing):
    step, _ = works_of(folder, "training", gradient_checkpointing=checkpointing, separate_passes=True)
    few, whole = (
        trace_work(replace(step, layers=8)),
        trace_work(replace(step, make=partial(step.make, num_layers=8), layers=None)),
    )
    assert (few.kept, few.peak) == pytest.approx((whole.kept, whole.peak))
    # Not the same operations: those of the optimizer are over all weights at once.
    seconds = [gpu_seconds(trace.operations, find_gpu("T4")) for trace in (few, whole)]
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-2)


def test_phases_are_sums_of_parts(folder):
    plan = plan_run("eraser", folder, **SMALL)
    assert [plan.setting[name] for name in ("num_frames", "height", "width")] == [9, 16, 16]
    parts, peaks = plan.parts, {phase.name: phase.peak for phase in plan.phases}
    config = tiny_video_pipeline(num_attention_heads=4, num_layers=4).transformer.config
    assert parts["eraser"] == parts["gradients"] == 4 * eraser_size(config, 8)
    step = ("transformer", "eraser", "optimizer", "gradients", "student's activations")
    assert peaks["training"] == sum(parts[name] for name in step)
    assert peaks["sampling"] == parts["transformer"] + parts["teacher's pass"]
    assert peaks["text"] == parts["text encoder"] + parts["text encoder's activations"]
    samples = next(size for name, size in plan.disk.items() if "samples" in name)
    assert samples == (3 * 10 + 2 * 20) * 3 * 4 * 4 * 4 * 4
    half = plan_run("eraser", folder, **{**SMALL, "trajectories_dtype": "fp16"})
    assert next(size for name, size in half.disk.items() if "samples" in name) == samples // 2


def test_videos_and_validation_need_the_vae(folder):
    plan = plan_run("eraser", folder, **SMALL, latents_source="video", validation=True)
    assert [phase.name for phase in plan.phases] == ["text", "training", "encoding", "validation"]
    assert {"VAE", "VAE's encoding", "VAE's decoding"} < set(plan.parts)
    assert not any("samples" in name for name in plan.disk)


def test_autocast_makes_layer_norms_wide(folder):
    half = {"mixed_precision": "bf16", "target_rows": 4, "preserved_rows": 4}
    setting = EraserPlanSettings(**{**SMALL, **half})
    draft = partial(draft_eraser, read_folder(folder), setting)
    on_cpu, on_gpu = (trace_work(draft(as_on_gpu=gpu).phases[-1].works[0]).peak for gpu in (False, True))
    assert on_cpu < on_gpu


def test_the_peaks_of_5b_in_the_published_size():
    plan = plan_run("eraser", "CogVideoX-5b", separate_passes=True)
    # 42 block inputs of 17,776 tokens of width 3072 in bf16
    checkpoints = 42 * 17_776 * 3072 * 2
    assert plan.parts["transformer"] == 2 * 5_570_283_072
    assert plan.parts["text encoder"] == 2 * 4_762_310_656
    assert checkpoints < plan.parts["student's activations"] < 2 * checkpoints
    assert plan.worst_phase == "training"
    assert 15 < plan.peak / 2**30 <= 20


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 65}, "`rank` must be from 1 to the transformer's width 64"),
        ({"num_frames": 10}, "`num_frames` must be a multiple of 8 plus 1"),
        ({"latents_source": "dream"}, "`latents_source` must be one of"),
        ({"sampling_batch_size": 0}, "`sampling_batch_size` must be at least 1, got 0"),
        ({"target_rows": 0, "preserved_rows": 0}, "must not both be 0"),
        ({"target_rows": -1}, "`target_rows` must be at least 0, got -1"),
    ],
)
def test_bad_settings(folder, setting, message):
    with pytest.raises(ValueError, match=message):
        plan_run("eraser", folder, **{**SMALL, **setting})


def test_text_of_several_tensors_and_an_embedded_guidance_are_planned(tmp_path):
    tiny_hunyuan_video_pipeline().save_pretrained(tmp_path)
    clip = {"num_frames": 5, "height": 32, "width": 32}
    draft = draft_eraser(read_folder(tmp_path), EraserPlanSettings(**SMALL, **clip))
    work = {phase.name: [*phase.works, *phase.untimed] for phase in draft.phases}
    assert all(trace_work(one).peak > 0 for phase in ("text", "sampling", "training") for one in work[phase])
    # Two blocks with a stream each, of width 32.
    assert draft.parts["eraser"] == 4 * 2 * (2 * 32 * 8 + 8 + 32)
    assert draft.parts["text encoder"] > 0
    with pytest.raises(ValueError, match="`localization` must be off for HunyuanVideo"):
        draft_eraser(read_folder(tmp_path), EraserPlanSettings(**SMALL, **clip, localization=True))


def test_linear_erasers_are_planned_without_biases(folder):
    draft = draft_eraser(read_folder(folder), EraserPlanSettings(**SMALL, kind="linear"))
    assert draft.parts["eraser"] == draft.parts["gradients"] == 4 * 4 * 2 * 64 * 8
    model = tiny_video_pipeline(num_attention_heads=4, num_layers=4).transformer
    trained = add_eraser(model, EraserTraining(rank=8, kind="linear"))
    assert draft.parts["eraser"] == sum(4 * parameter.numel() for parameter in trained)
    rows = {"target_rows": 4, "preserved_rows": 4}
    step, _ = works_of(folder, "training", kind="linear", **rows)
    run = training_step(4, False, False, False, kind="linear")
    run()
    assert trace_work(step).peak == pytest.approx(peak_bytes(run), rel=0.15)


@pytest.mark.parametrize("points", [3, 6])
def test_two_transformers_are_counted_with_the_runs_that_the_training_makes(tmp_path, points):
    pipeline = tiny_wan_pipeline()
    second = copy.deepcopy(pipeline.transformer)
    pipeline = WanPipeline(**{**pipeline.components, "transformer_2": second}, boundary_ratio=0.7)
    pipeline.save_pretrained(tmp_path)
    size, steps = ClipSize(5, 32, 32), 6
    counts = {"num_target_trajectories": 2, "num_preserved_trajectories": 3, "points_per_trajectory": points}
    shared = {"num_inference_steps": steps, "sampling_batch_size": 2, **counts}
    setting = EraserPlanSettings(rank=4, mixed_precision="no", **size._asdict(), **shared)
    draft = draft_eraser(read_folder(tmp_path), setting)
    text = torch.randn(1, 16, pipeline.transformer.config.text_dim)
    calls = {"kept": 0, "others": 0}

    def count(_, arguments, keywords):
        calls["kept" if len(keywords["hidden_states"]) in (3, 5, 6) else "others"] += 1

    hooks = [model.register_forward_pre_hook(count, with_kwargs=True) for model in (pipeline.transformer, second)]
    recipe = EraserTraining(rank=4, **shared)
    for expert in ("transformer", "transformer_2"):
        given = (EraserText(text, text + 1, text, text[0] - 1), recipe, size.latent_shape(pipeline))
        collect_teacher_samples(size.velocity(pipeline, expert), pipeline.scheduler, *given, show_progress=False)
    for hook in hooks:
        hook.remove()
    kept, others = next(phase for phase in draft.phases if phase.name == "sampling").works
    assert (kept.times, others.times) == (calls["kept"], calls["others"])
    assert kept.times + others.times < 2 * 3 * steps
    assert not any("whole runs" in note for note in draft.assumptions)


def test_a14b_is_planned_with_its_boundary():
    run = eraser_run(read_base_model("Wan2.2-A14B"), EraserPlanSettings())
    high, low = run.served_steps()
    assert [*high, *low] == list(range(50))
    assert 10 < len(high) < 20  # t = 875 lies at 0.7 of the way for a shift of 3
    with pytest.raises(ValueError, match="`num_inference_steps` must have a step for each of the model's"):
        eraser_run(read_base_model("Wan2.2-A14B"), EraserPlanSettings(num_inference_steps=1)).served_steps()


def test_image_models_are_refused():
    with pytest.raises(ValueError, match="`model` must be a model that draws clips, .*, got .*, a SDXL"):
        draft_eraser(read_base_model("SDXL"), EraserPlanSettings(**SMALL))
