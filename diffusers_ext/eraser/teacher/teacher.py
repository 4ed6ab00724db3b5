"""The frozen teacher of an eraser's training, and calls of several rows in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from diffusers_ext.core.restored_state import module_eval_mode
from diffusers_ext.eraser.adapter.outputs import eraser_layers, erasers_disabled
from diffusers_ext.families.registry import match_family
from diffusers_ext.families.velocity import Velocity

# `model(x_t, t, prompt_embeds)` gives the velocity: a `CogVideoXVelocity` or a module like it.
VelocityModel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# x_t (batch, frames, channels, height, width), t (batch,), prompt_embeds (1 or batch, text, dim)
VelocityRows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_WRAPPERS = ("base_model", "model", "module", "_orig_mod")


def module_of(model: VelocityModel) -> torch.nn.Module:
    """The module behind a velocity model; `TypeError` for a mere function."""
    _refuse_transformer(model)
    if isinstance(model, Velocity):
        return model.model
    if isinstance(model, torch.nn.Module):
        return model
    raise TypeError(f"`model` must be a CogVideoXVelocity or a torch.nn.Module, got {type(model).__name__}.")


def _refuse_transformer(model: VelocityModel) -> None:
    # Not wrapped in silence: without the rotary embedding of its clip, of which the transformer
    # alone does not know the size, it predicts nonsense.
    inner = model
    while isinstance(inner, torch.nn.Module):
        if match_family(inner, "eraser") is not None:
            raise TypeError(
                "Losses must be given a model called as `model(x_t, t, prompt_embeds)`, got a "
                f"{type(model).__name__} of a CogVideoX. Give `CogVideoXVelocity.from_pipeline("
                "pipe, num_frames, height, width)`, which calls it with the positions of its clip."
            )
        children = dict(inner.named_children())
        # PEFT, `torch.compile` and DDP hold the model alone, under one of these names.
        alone = len(children) == 1 and next(iter(children)) in _WRAPPERS
        inner = next(iter(children.values())) if alone else None


def velocities(model: VelocityModel, rows: Sequence[VelocityRows]) -> list[torch.Tensor]:
    """Velocities of several groups of rows, each of the shape of its `x_t`, from one call.

    Embeddings of one row serve their whole group.

    Raises:
        ValueError: embeddings of different lengths, or of another batch than their `x_t`.
    """
    _refuse_transformer(model)
    sizes = [len(x_t) for x_t, _, _ in rows]
    embeds = []
    for x_t, _, prompt_embeds in rows:
        if len(prompt_embeds) not in (1, len(x_t)) or prompt_embeds.ndim != 3:
            raise ValueError(
                f"`prompt_embeds` must be (1 or {len(x_t)}, text, text_dim), got {tuple(prompt_embeds.shape)}."
            )
        embeds.append(prompt_embeds.expand(len(x_t), -1, -1))
    lengths = sorted({embed.shape[1] for embed in embeds})
    if len(lengths) > 1:
        raise ValueError(
            f"`prompt_embeds` must have one text length, got {lengths}. Pad all prompts to the "
            "same `max_sequence_length`."
        )
    x_t, t = torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
    return list(model(x_t, t, torch.cat(embeds)).split(sizes))


@torch.no_grad()
def teacher_velocities(
    model_original: VelocityModel, model_unlearned: VelocityModel, rows: Sequence[VelocityRows]
) -> list[torch.Tensor]:
    """What the model before erasing predicts: erasers off, eval mode, no gradient.

    The teacher may be the student itself or share its transformer. LoRAs stay on.

    Raises:
        ValueError: teacher and student are the same module and it has no eraser.
    """
    module = module_of(model_original)
    if module is module_of(model_unlearned) and not eraser_layers(module):
        raise ValueError(
            f"`model_unlearned` must carry an eraser, got a {type(module).__name__} without one "
            "that is the teacher as well."
        )
    with module_eval_mode(module), erasers_disabled(module):
        return [velocity.detach() for velocity in velocities(model_original, rows)]


def cached_or_predicted(
    model_original: VelocityModel | None,
    model_unlearned: VelocityModel,
    needed: Sequence[tuple[torch.Tensor | None, VelocityRows]],
) -> list[torch.Tensor]:
    """Detached teacher velocities: those made before as they are, the others from one pass.

    Args:
        model_original: see `teacher_velocities`; `None` where all velocities are cached.
        model_unlearned: the student.
        needed: pairs of a cached velocity or `None`, and the rows that it is of.

    Raises:
        ValueError: a velocity is not cached and there is no teacher.
    """
    missing = [rows for cached, rows in needed if cached is None]
    if missing and model_original is None:
        raise ValueError("`model_original` must be given for velocities not made before, got None.")
    found = iter(teacher_velocities(model_original, model_unlearned, missing) if missing else ())
    return [next(found) if cached is None else cached.detach() for cached, _ in needed]
