"""Peak memory of an eraser's training step, traced from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from peft import inject_adapter_in_model

from diffusers_ext.core.gpu_autocast import gpu_autocast
from diffusers_ext.core.memory_trace import (
    MemoryTrace,
    fake_tensors,
    fill_with_fake_tensors,
    tensor_bytes,
)
from diffusers_ext.eraser.concept_attention import concept_attention
from diffusers_ext.eraser.config import EraserConfig
from diffusers_ext.eraser.outputs import erasers_disabled, trainable_eraser_parameters
from diffusers_ext.eraser.shaped_step import (
    ADAPTER_NAME,
    StepShape,
    empty_inputs,
    student_pass,
)
from diffusers_ext.families.cogvideox import CogVideoX
from diffusers_ext.families.family import import_class
from diffusers_ext.families.registry import find_family
from diffusers_ext.families.velocity import Velocity


# Blocks that are traced where a model has more: memory is linear in their number from here on.
_TRACED_LAYERS = (2, 3)


class StepMemory(NamedTuple):
    """Bytes; `student`, `teacher` and `update` are peaks beyond what is always there."""

    transformer: int
    eraser: int
    optimizer: int  # both moments of AdamW
    student: int  # forward and backward, gradients included
    teacher: int
    update: int  # gradients and temporaries of the optimizer's step

    @property
    def training(self) -> int:
        """Peak of a step with velocities from before."""
        return self.kept + max(self.student, self.update)

    @property
    def kept(self) -> int:
        """What stays from step to step."""
        return self.transformer + self.eraser + self.optimizer


def step_memory(
    transformer_config: Mapping[str, Any], shape: StepShape, *, exact: bool = False
) -> StepMemory:
    """Peak memory of a step.

    The library's own adapter, losses and masks run forward and backward over fake tensors, in float32
    for the eraser whatever the base's dtype; the step of AdamW is counted in its form for GPUs.

    Args:
        transformer_config: of a `CogVideoXTransformer3DModel`.
        shape: of the step.
        exact: trace all blocks; otherwise a few, and the rest is linear in their number.
    """
    config = dict(transformer_config)
    layers, (few, more) = config["num_layers"], _TRACED_LAYERS
    if exact or layers <= 2 * more:
        return _trace_step(config, shape)
    first, second = (_trace_step({**config, "num_layers": n}, shape) for n in (few, more))
    found = (
        a + (b - a) * (layers - few) // (more - few) for a, b in zip(first, second, strict=True)
    )
    return StepMemory(*found)


def meta_transformer(
    transformer_config: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> ModelMixin:
    """A transformer without data, frozen, on the meta device.

    Args:
        transformer_config: of a `CogVideoXTransformer3DModel`.
        dtype: of its weights.
    """
    with torch.device("meta"):
        model = import_class(CogVideoX.denoiser_class).from_config(dict(transformer_config))
    # Not the method of diffusers, which has a warning about every cast.
    return torch.nn.Module.to(model, dtype).requires_grad_(False)


def transformer_with_eraser(transformer_config: Mapping[str, Any], shape: StepShape) -> ModelMixin:
    """A transformer without data and with an eraser to be trained, on the meta device.

    Args:
        transformer_config: of a `CogVideoXTransformer3DModel`.
        shape: of the step.
    """
    model = meta_transformer(transformer_config, shape.dtype)
    inject_adapter_in_model(EraserConfig(r=shape.rank), model, ADAPTER_NAME, low_cpu_mem_usage=True)
    if shape.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def _trace_step(config: dict[str, Any], shape: StepShape) -> StepMemory:
    model = transformer_with_eraser(config, shape)
    fake = fake_tensors()
    with fake:
        fill_with_fake_tensors(model)
        weights = trainable_eraser_parameters(model, ADAPTER_NAME)
        velocity = find_family(model, "eraser").empty_velocity(
            model, shape.latent_shape, shape.dtype
        )
    # Which rows hold the concept is data, so this is not entered under fake tensors.
    with _read_attention(model, shape), fake, erasers_disabled(model.eval()):
        teacher = _teacher_peak(velocity, shape)
    model.train()
    with fake:
        student = _student_peak(velocity, shape)
    eraser = tensor_bytes(weights)
    frozen = tensor_bytes([*model.parameters(), *model.buffers()]) - eraser
    return StepMemory(frozen, eraser, 2 * eraser, student, teacher, 2 * eraser)


def _trace(velocity: Velocity) -> MemoryTrace:
    return MemoryTrace([*velocity.model.parameters(), *velocity.model.buffers()])


@torch.no_grad()
def _teacher_peak(velocity: Velocity, shape: StepShape) -> int:
    """Peak of one pass without gradients, its inputs included."""
    if not shape.teacher_rows:
        return 0
    with _trace(velocity) as trace, _gpu_autocast(velocity.model, shape):
        velocity(*empty_inputs(velocity, shape, shape.teacher_rows))
    return trace.peak


def _student_peak(velocity: Velocity, shape: StepShape) -> int:
    """Peak of forward and backward: inputs, teacher velocities and gradients included."""
    with _trace(velocity) as trace, _gpu_autocast(velocity.model, shape):
        student_pass(velocity, shape)
    return trace.peak


@contextmanager
def _read_attention(model: ModelMixin, shape: StepShape) -> Iterator[None]:
    """Read the concept's attention in a third of the teacher's rows, where masks are made."""
    if not (shape.localization and shape.teacher_rows):
        yield
        return
    text = shape.text or model.config.max_text_seq_length
    concept = torch.zeros(shape.teacher_rows, text, dtype=torch.bool)
    concept[: max(1, shape.teacher_rows // 3), 0] = True
    with concept_attention(model, concept):
        yield


@contextmanager
def _gpu_autocast(model: ModelMixin, shape: StepShape) -> Iterator[None]:
    """Autocast as on a GPU, where a shape asks for it."""
    with gpu_autocast(model, shape.dtype if shape.autocast else torch.float32):
        yield
