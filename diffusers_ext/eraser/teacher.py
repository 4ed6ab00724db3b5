"""The frozen teacher of an eraser's training, and calls of several rows in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import CogVideoXTransformer3DModel

from diffusers_ext.core.quiet_run import module_eval_mode
from diffusers_ext.eraser.outputs import eraser_layers, erasers_disabled
from diffusers_ext.eraser.velocity import CogVideoXVelocity


# `model(x_t, t, prompt_embeds)` gives the velocity: a `CogVideoXVelocity` or a module like it.
VelocityModel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# x_t (batch, frames, channels, height, width), t (batch,), prompt_embeds (1 or batch, text, dim)
VelocityRows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_WRAPPERS = ("base_model", "model", "module", "_orig_mod")


def module_of(model: VelocityModel) -> torch.nn.Module:
    """The module behind a velocity model.

    Raises:
        TypeError: neither a `CogVideoXVelocity` nor a module.
    """
    check_velocity_model(model)
    if isinstance(model, CogVideoXVelocity):
        return model.model
    if isinstance(model, torch.nn.Module):
        return model
    raise TypeError(
        f"`model` must be a CogVideoXVelocity or a torch.nn.Module, got {type(model).__name__}."
    )


def check_velocity_model(model: VelocityModel) -> None:
    """Raise `TypeError` for a CogVideoX transformer itself, which takes other arguments than a loss gives.

    It is not wrapped in silence: without the rotary embedding of its clip, of which the transformer
    alone does not know the size, it predicts nonsense.
    """
    if isinstance(model, torch.nn.Module) and is_transformer(model):
        raise TypeError(
            "Losses must be given a model called as `model(x_t, t, prompt_embeds)`, got a "
            f"{type(model).__name__} of a CogVideoX. Give `CogVideoXVelocity.from_pipeline(pipe, "
            "num_frames, height, width)`, which calls it with the positions of its clip."
        )


def is_transformer(model: torch.nn.Module) -> bool:
    """Whether a module is a CogVideoX transformer, also under PEFT, `torch.compile` or DDP."""
    while not isinstance(model, CogVideoXTransformer3DModel):
        inner = [part for name, part in model.named_children() if name in _WRAPPERS]
        if len(inner) != 1 or len(list(model.children())) != 1:
            return False
        model = inner[0]
    return True


def velocities(model: VelocityModel, rows: Sequence[VelocityRows]) -> list[torch.Tensor]:
    """Velocities of several groups of rows from one call of the model.

    Args:
        model: called as `model(x_t, t, prompt_embeds)`.
        rows: `(x_t, t, prompt_embeds)` of each group; embeddings of one row serve its whole group.

    Returns:
        One velocity per group, of the shape of its `x_t`.

    Raises:
        ValueError: embeddings of different lengths, or of another batch than their `x_t`.
    """
    check_velocity_model(model)
    sizes = [len(x_t) for x_t, _, _ in rows]
    embeds = []
    for x_t, _, prompt_embeds in rows:
        if len(prompt_embeds) not in (1, len(x_t)) or prompt_embeds.ndim != 3:
            raise ValueError(
                f"`prompt_embeds` must be (1 or {len(x_t)}, text, text_dim), got "
                f"{tuple(prompt_embeds.shape)}."
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

    Args:
        model_original: the teacher; may be the student itself or share its transformer, whose
            erasers are off during the call. LoRAs stay on.
        model_unlearned: the student.
        rows: see `velocities`.

    Returns:
        One velocity per group of rows, detached.

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
    wanted: Sequence[tuple[torch.Tensor | None, VelocityRows]],
) -> list[torch.Tensor]:
    """Teacher velocities, those made before as they are and the others from one pass.

    Args:
        model_original: see `teacher_velocities`; `None` where all velocities are known.
        model_unlearned: the student.
        wanted: pairs of a velocity, if it is known, and the rows that it is of.

    Returns:
        One detached velocity per pair.

    Raises:
        ValueError: a velocity is unknown and there is no teacher.
    """
    missing = [rows for known, rows in wanted if known is None]
    if missing and model_original is None:
        raise ValueError("`model_original` must be given for velocities not made before, got None.")
    asked = iter(teacher_velocities(model_original, model_unlearned, missing) if missing else ())
    return [next(asked) if known is None else known.detach() for known, _ in wanted]
