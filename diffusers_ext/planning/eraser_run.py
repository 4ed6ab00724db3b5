"""The run of an eraser's training, from its prompts to its file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import T5Config, T5EncoderModel

from diffusers_ext.eraser.outputs import erasers_disabled, trainable_eraser_parameters
from diffusers_ext.eraser.shaped_step import (
    ADAPTER_NAME,
    StepShape,
    empty_inputs,
    student_pass,
)
from diffusers_ext.eraser.training_memory import transformer_with_eraser
from diffusers_ext.families.cogvideox import CogVideoX
from diffusers_ext.families.family import import_class
from diffusers_ext.families.registry import find_family, match_family, titles_of
from diffusers_ext.planning.base_model import BaseModel
from diffusers_ext.planning.disk_sizes import (
    REPORT_BYTES,
    checkpoint_bytes,
    kept_checkpoints,
    safetensors_bytes,
)
from diffusers_ext.planning.eraser_run_setting import EraserRunSetting
from diffusers_ext.planning.eraser_training import (
    EraserSetting,
    PipelineConfigs,
    fill_size,
    plan_eraser_training,
    step_shape,
)
from diffusers_ext.planning.run_draft import Phase, RunDraft
from diffusers_ext.planning.work import Job, Precision, Work


_MAX_GRAD_NORM, _VAE = 1.0, "VAE"


def draft_eraser(base: BaseModel, *, as_on_gpu: bool = True, **setting: Any) -> RunDraft:
    """The phases of an eraser's training.

    Args:
        base: a CogVideoX.
        as_on_gpu: shapes are traced as a GPU runs them.
        setting: fields of `EraserRunSetting`.

    Raises:
        ValueError: another pipeline, or a setting that the model cannot take.
    """
    if match_family(base.components[base.denoiser].class_name, "eraser") is None:
        raise ValueError(
            f"`model` must be a {titles_of('eraser')} pipeline for the eraser, got {base.pipeline or 'none'} in "
            f"{base.name}."
        )
    missing = [name for name in PipelineConfigs._fields if name not in base.components]
    if missing:
        raise ValueError(
            f"`model` must have a {missing[0]}, got {base.name} with {sorted(base.components)}."
        )
    run = EraserRunSetting(**setting)
    configs = PipelineConfigs(*(base.components[name].config for name in PipelineConfigs._fields))
    plan = plan_eraser_training(configs, run.memory_setting())
    _, latents, tokens = fill_size(configs, plan.setting)
    precision = Precision(plan.setting.dtype, as_on_gpu)
    shapes = _Shapes(configs, step_shape(plan.setting, latents), plan.setting, tokens, precision)
    works = _works(run, shapes)
    parts, peaks = dict(plan.parts), dict(plan.phases)
    if not as_on_gpu:
        # It waits in the host's memory, which is the device's own here.
        parts[_VAE] = base.components["vae"].bytes(plan.setting.dtype)
        waits = [name for name in ("sampling", "training") if name in peaks]
        peaks.update({name: peaks[name] + parts[_VAE] for name in waits})
    phases = [Phase(name, (), works.get(name, ()), peak) for name, peak in peaks.items()]
    size = {name: getattr(plan.setting, name) for name in ("num_frames", "height", "width")}
    notes = []
    if run.latents_source != "trajectory":
        notes.append("Passes of the teacher inside of steps are in the memory, not in the time.")
    if run.latents_source == "video":
        notes.append("The time to read and encode videos is not counted.")
    disk = _disk(run, shapes, plan.samples)
    return RunDraft("eraser", base, {**asdict(run), **size}, parts, phases, disk, notes)


class _Shapes(NamedTuple):
    configs: PipelineConfigs
    step: StepShape
    setting: EraserSetting
    tokens: int  # of a prompt
    precision: Precision

    def transformer(self, layers: int | None = None) -> dict[str, Any]:
        """Config of the transformer, or of one with fewer blocks."""
        config = dict(self.configs.transformer)
        return config if layers is None else {**config, "num_layers": layers}


def _works(run: EraserRunSetting, shapes: _Shapes) -> dict[str, list[Work]]:
    """What each phase of the training script does."""
    passes = run.num_inference_steps
    batches = math.ceil(run.num_target_trajectories / run.sampling_batch_size)
    preserved = math.ceil(run.num_preserved_trajectories / run.sampling_batch_size)
    kept = min(run.points_per_trajectory, passes)
    # The anchor is asked where a point of a target run is kept; guidance needs two prompts always.
    three, two = batches * kept, batches * (passes - kept) + preserved * passes
    rows = run.sampling_batch_size
    # Beside the eraser's clip of each validation, once the base model's.
    drawn = 1 + math.ceil(run.max_train_steps / (run.validation_steps or run.max_train_steps))
    text = math.ceil(run.num_prompts / run.text_batch_size)
    layers = shapes.transformer()["num_layers"]

    def teacher(times: float, asked: int) -> Work:
        return Work("teacher's pass", times, partial(_teacher_job, shapes, asked), layers=layers)

    step = partial(_step_job, run, shapes)
    return {
        "text": [Work("text encoder's activations", text, partial(_text_job, shapes))],
        "sampling": [teacher(three, 3 * rows), teacher(two, 2 * rows)],
        "training": [Work("student's activations", run.max_train_steps, step, layers=layers)],
        "validation": [
            teacher(drawn * passes, 2),
            Work("VAE's decoding", drawn, partial(_decode_job, shapes)),
        ],
    }


def _text_job(shapes: _Shapes) -> Job:
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**shapes.configs.text_encoder))
    encoder = encoder.to(shapes.setting.dtype).requires_grad_(False).eval()

    def begin(device: torch.device) -> Callable[[], object]:
        size = (shapes.setting.text_batch_size, shapes.tokens)
        return torch.no_grad()(lambda: encoder(torch.zeros(size, dtype=torch.long, device=device)))

    return Job([encoder], begin)


def _teacher_job(shapes: _Shapes, rows: int, layers: int | None = None) -> Job:
    model = transformer_with_eraser(shapes.transformer(layers), shapes.step).eval()

    def begin(device: torch.device) -> Callable[[], object]:
        velocity = find_family(model, "eraser").empty_velocity(
            model, shapes.step.latent_shape, shapes.step.dtype
        )
        inputs = empty_inputs(velocity, shapes.step, rows)

        @torch.no_grad()
        def repeat() -> None:
            with erasers_disabled(model), shapes.precision.autocast(model):
                velocity(*inputs)

        return repeat

    return Job([model], begin)


def _step_job(run: EraserRunSetting, shapes: _Shapes, layers: int | None = None) -> Job:
    model = transformer_with_eraser(shapes.transformer(layers), shapes.step).train()

    def begin(device: torch.device) -> Callable[[], object]:
        weights = trainable_eraser_parameters(model, ADAPTER_NAME)
        optimizer = torch.optim.AdamW(weights)
        velocity = find_family(model, "eraser").empty_velocity(
            model, shapes.step.latent_shape, shapes.step.dtype
        )

        def repeat() -> None:
            for _ in range(run.gradient_accumulation_steps):
                with shapes.precision.autocast(model):
                    student_pass(velocity, shapes.step)
            torch.nn.utils.clip_grad_norm_(weights, _MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()

        return repeat

    return Job([model], begin)


def _decode_job(shapes: _Shapes) -> Job:
    with torch.device("meta"):
        vae = import_class(CogVideoX.vae_class).from_config(dict(shapes.configs.vae))
    vae = torch.nn.Module.to(vae, shapes.setting.dtype).requires_grad_(False).eval()
    frames, channels, height, width = shapes.step.latent_shape

    def begin(device: torch.device) -> Callable[[], object]:
        size = (1, channels, frames, height, width)
        latents = torch.randn(size, dtype=shapes.setting.dtype, device=device)
        return torch.no_grad()(lambda: vae.decode(latents))

    return Job([vae], begin)


def _disk(run: EraserRunSetting, shapes: _Shapes, samples: int) -> dict[str, int]:
    model = transformer_with_eraser(shapes.configs.transformer, shapes.step)
    weights = {n: p for n, p in model.named_parameters() if "eraser_" in n}
    disk = {"eraser": safetensors_bytes(weights) + REPORT_BYTES}
    if samples:
        disk["teacher's samples (on disk, or in the host's memory)"] = samples
    checkpoint = checkpoint_bytes(weights.values(), weights.values())
    count = kept_checkpoints(
        run.max_train_steps, run.checkpointing_steps, run.checkpoints_total_limit
    )
    return {**disk, "checkpoints": count * checkpoint} if count else disk
