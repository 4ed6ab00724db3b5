"""A training step of an eraser over tensors of given shapes, without content."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from diffusers_ext.eraser.outputs import eraser_outputs
from diffusers_ext.eraser.step import run_in_turn
from diffusers_ext.eraser.velocity_losses import layer_localization, velocity_distance
from diffusers_ext.families.velocity import Velocity


ADAPTER_NAME = "default"


@dataclass(frozen=True)
class StepShape:
    """What the memory of a training step depends on, besides the transformer.

    Attributes:
        latent_shape: `(frames, channels, height, width)` of one row.
        rank: of the eraser.
        target_rows, preserved_rows: of a step; their sum is the student's batch in one pass.
        rows_in_turn: target rows, then preserved rows go through the student; see `run_in_turn`.
        teacher_rows: of one pass of the teacher, in sampling or in a step without stored velocities.
        dtype: of the frozen weights.
        autocast: as accelerate runs half precision on a GPU: layer norms give float32.
        gradient_checkpointing: blocks are computed again for their gradients.
        localization: masks are made, and the erasers' outputs outside of them cost.
        text: tokens of a prompt; the transformer's own when `None`.
    """

    latent_shape: tuple[int, int, int, int]
    rank: int = 128
    target_rows: int = 1
    preserved_rows: int = 1
    rows_in_turn: bool = False
    teacher_rows: int = 3
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = True
    gradient_checkpointing: bool = True
    localization: bool = False
    text: int | None = None

    def __post_init__(self) -> None:
        for name in ("target_rows", "preserved_rows", "teacher_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if not self.target_rows + self.preserved_rows:
            raise ValueError("`target_rows` and `preserved_rows` must not both be 0.")
        if self.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"`dtype` must be float32, float16 or bfloat16, got {self.dtype}.")


def student_pass(velocity: Velocity, shape: StepShape) -> None:
    """Forward and backward of a training step over tensors without content.

    Args:
        velocity: of a transformer with a trainable eraser, anywhere.
        shape: of the step.
    """
    n, rows = shape.target_rows, shape.target_rows + shape.preserved_rows
    inputs = empty_inputs(velocity, shape, rows)
    wanted, unerased = torch.empty_like(inputs[0]), torch.empty_like(inputs[0][:n])
    mask = None
    if shape.localization and n:
        mask = torch.empty(n, *velocity.token_grid(shape.latent_shape), device=wanted.device)
    borders = (0, n, rows) if shape.rows_in_turn else (0, rows)
    passes = [
        partial(_ask, velocity, [part[start:stop] for part in inputs], mask if start < n else None)
        for start, stop in pairwise(borders)
        if start < stop
    ]
    answers = run_in_turn(passes) if shape.rows_in_turn else [ask() for ask in passes]
    prediction = torch.cat([part for part, _ in answers])
    losses = [found for _, found in answers if found is not None]
    chosen = [part for part in (slice(None, n), slice(n, None)) if len(wanted[part])]
    losses += [velocity_distance(prediction[part], wanted[part]) for part in chosen]
    velocity_distance(prediction[:n].detach(), unerased)
    sum(losses).backward()


def _ask(
    velocity: Velocity, inputs: list[torch.Tensor], mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Velocities, and what the erasers add outside of a mask of the first rows."""
    if mask is None:
        return velocity(*inputs), None

    def outside(name: str, output: torch.Tensor) -> torch.Tensor:
        return layer_localization(output[: len(mask)], mask)

    with eraser_outputs(velocity.model, ADAPTER_NAME, reduce=outside) as outputs:
        prediction = velocity(*inputs)
    return prediction, torch.stack(list(outputs.values())).mean()


def empty_inputs(velocity: Velocity, shape: StepShape, rows: int) -> tuple[torch.Tensor, ...]:
    """x_t, t and prompt embeddings of so many rows, where the model is."""
    config, device = velocity.config, velocity.model.device
    text = (rows, shape.text or config["max_text_seq_length"], config["text_embed_dim"])
    return (
        torch.empty(rows, *shape.latent_shape, device=device),
        torch.zeros(rows, dtype=torch.long, device=device),
        torch.empty(text, dtype=shape.dtype, device=device),
    )
