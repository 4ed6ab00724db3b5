"""Collect an eraser's training samples along runs of the frozen model, in memory or on disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import SchedulerMixin
from tqdm.auto import tqdm

from diffusers_ext.eraser.adapter.outputs import eraser_layers, frozen_teacher, unwrapped_transformer
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.teacher.runs import EraserText, SamplePart, TeacherRuns, calibrate_heads, plan_trajectories
from diffusers_ext.eraser.teacher.store import TeacherFiles, TeacherMemory, TeacherSamples
from diffusers_ext.eraser.teacher.trajectory import check_predicts_velocity, served_steps
from diffusers_ext.families.family import Velocity
from diffusers_ext.families.text_conditioning import Text, join_texts, repeat_text, token_embeds

logger = logging.getLogger(__name__)

# `model(x_t, t, prompt_embeds)` gives the velocity: a `CogVideoXVelocity` or a module like it.
VelocityModel = Callable[[torch.Tensor, torch.Tensor, Text], torch.Tensor]
# x_t (batch, frames, channels, height, width), t (batch,), prompt_embeds (1 or batch, text, dim)
VelocityRows = tuple[torch.Tensor, torch.Tensor, Text]


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
    if unwrapped_transformer(model) is not None:
        raise TypeError(
            "Losses must be given a model called as `model(x_t, t, prompt_embeds)`, got a "
            f"{type(model).__name__} of a CogVideoX. Give `CogVideoXVelocity.from_pipeline("
            "pipe, num_frames, height, width)`, which calls it with the positions of its clip."
        )


def velocities(model: VelocityModel, rows: Sequence[VelocityRows]) -> list[torch.Tensor]:
    """Velocities of several groups of rows, each of the shape of its `x_t`, from one call.

    Embeddings of one row serve their whole group.
    """
    _refuse_transformer(model)
    sizes = [len(x_t) for x_t, _, _ in rows]
    embeds = []
    for x_t, _, prompt_embeds in rows:
        tokens = token_embeds(prompt_embeds)
        if len(tokens) not in (1, len(x_t)) or tokens.ndim != 3:
            raise ValueError(f"`prompt_embeds` must be (1 or {len(x_t)}, text, text_dim), got {tuple(tokens.shape)}.")
        embeds.append(repeat_text(prompt_embeds, len(x_t)) if len(tokens) == 1 else prompt_embeds)
    lengths = sorted({token_embeds(embed).shape[1] for embed in embeds})
    if len(lengths) > 1:
        raise ValueError(
            f"`prompt_embeds` must have one text length, got {lengths}. Pad all prompts to the "
            "same `max_sequence_length`."
        )
    x_t, t = torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
    return list(model(x_t, t, join_texts(embeds)).split(sizes))


def teacher_velocities(
    model_original: VelocityModel, model_unlearned: VelocityModel, rows: Sequence[VelocityRows]
) -> list[torch.Tensor]:
    """What the model before erasing predicts: erasers off, eval mode, no gradient.

    The teacher may be the student itself or share its transformer. LoRAs stay on.
    """
    module = module_of(model_original)
    if module is module_of(model_unlearned) and not eraser_layers(module):
        raise ValueError(
            f"`model_unlearned` must carry an eraser, got a {type(module).__name__} without one "
            "that is the teacher as well."
        )
    with frozen_teacher(module):
        return [velocity.detach() for velocity in velocities(model_original, rows)]


def cached_or_predicted(
    model_original: VelocityModel | None,
    model_unlearned: VelocityModel,
    needed: Sequence[tuple[torch.Tensor | None, VelocityRows]],
) -> list[torch.Tensor]:
    """Detached teacher velocities: those made before as they are, the others from one pass.

    `needed` are pairs of a cached velocity or `None`, and the rows that it is of; where all are cached, no
    `model_original` is needed. See `teacher_velocities`.
    """
    missing = [rows for cached, rows in needed if cached is None]
    if missing and model_original is None:
        raise ValueError("`model_original` must be given for velocities not made before, got None.")
    found = iter(teacher_velocities(model_original, model_unlearned, missing) if missing else ())
    return [next(found) if cached is None else cached.detach() for cached, _ in needed]


# Folders with masks made in another way are told by it.
MASK_KIND = "weighted heads x velocities"


def collect_teacher_samples(
    velocity: Velocity,
    scheduler: SchedulerMixin,
    text: EraserText,
    recipe: EraserTraining,
    latent_shape: Sequence[int],
    *,
    token_mask: torch.Tensor | None = None,
    directory: str | os.PathLike | None = None,
    facts: dict[str, Any] | None = None,
    storage_dtype: torch.dtype = torch.float32,
    process: tuple[int, int] = (0, 1),
    wait_for_everyone: Callable[[], None] | None = None,
    show_progress: bool = True,
) -> TeacherSamples:
    """Let the frozen model sample clips of the prompts, and keep points of these runs.

    A point is what the model reads on its way (no noised data is needed), with its velocities of the prompt and of its
    anchor. Each run has its own generator on the CPU, so that it depends on the recipe's seed and its number alone,
    whatever the batch (up to rounding). A pass has up to three times as many rows as runs.

    Args:
        scheduler: samples; a copy is used. DDIM and DPM of CogVideoX, Euler and UniPC of flow matching, and any
            other that steps in the same way.
        text: its dtype is that of the latents.
        token_mask: `(target prompts, text)` bool, the concept's tokens; rows then have masks, of the heads that
            `calibrate_heads` finds and of the velocities (`weighted_attention_mask`).
        directory: where the samples are kept, one file a run; what is there is not made again.
        facts: JSON-able, how the embeddings were made: model, prompts, adapters, ... Needed with a `directory`, whose
            own facts must be the same.
        storage_dtype: of the floating-point rows where they are kept; items are float32.
        process: `(index, count)` of the processes that share a `directory`; `wait_for_everyone` is called when this
            one has made its share.
    """
    counts = {"target": recipe.num_target_trajectories, "preserved": recipe.num_preserved_trajectories}
    if counts["preserved"] and not len(text.preserved):
        raise ValueError(
            f"`preserved_embeds` must hold a prompt for {counts['preserved']} runs, got none. Set "
            "`num_preserved` to 0 to do without."
        )
    check_predicts_velocity(scheduler, velocity)
    served = served_steps(velocity, scheduler, recipe.num_inference_steps, latent_shape)
    num_steps, points = len(served), recipe.points_per_trajectory
    if points is not None and points > num_steps:
        logger.info("All %d points of every run are kept: `points_per_trajectory` is %d.", num_steps, points)
        points = num_steps
    options = {"points_per_trajectory": points, "seed": recipe.seed}
    parts = []
    for name, prompts, others, tokens, share in (
        ("target", text.target, text.anchor, token_mask, 0.0),
        ("preserved", text.preserved, repeat_text(text.empty, len(text.preserved)), None, recipe.empty_share),
    ):
        given = (name, counts[name], len(prompts), num_steps)
        plans = plan_trajectories(*given, empty_share=share, served=served, **options)
        parts.append(SamplePart(name, prompts, others, tokens, plans))
    if directory is not None:
        settings = {
            "latent_shape": tuple(latent_shape),
            "num_inference_steps": recipe.num_inference_steps,
            "guidance_scale": recipe.sampling_guidance_scale,
            "mask_threshold": recipe.mask_threshold,
            **options,
            **{f"num_{name}": count for name, count in counts.items()},
            "empty_share": recipe.empty_share,
            "masks": token_mask is not None and MASK_KIND,
        }
        kept = TeacherFiles(directory, scheduler, velocity.model, settings, facts, storage_dtype)
    elif process != (0, 1):
        raise ValueError("`directory` must be given where processes share the runs, got None.")
    else:
        kept = TeacherMemory(storage_dtype)
    runs = TeacherRuns(velocity, scheduler, text.empty, recipe, latent_shape)
    for part in parts:
        if part.token_mask is not None and part.plans:
            given = (velocity, scheduler, text, token_mask, recipe, latent_shape)
            make = partial(calibrate_heads, *given, show_progress=show_progress)
            if wait_for_everyone is not None:
                _make_first(partial(kept.head_weights, make), process, wait_for_everyone)
            part = part._replace(head_weights=kept.head_weights(make))
        _make_part(part, runs, kept, process, show_progress)
    if wait_for_everyone is not None:
        wait_for_everyone()
    return kept.samples()


def _make_first(make: Callable[[], Any], process: tuple[int, int], wait_for_everyone: Callable[[], None]) -> None:
    """Let the first process make what all of them read afterwards."""
    if process[0] == 0:
        make()
    wait_for_everyone()


def _make_part(
    part: SamplePart,
    runs: TeacherRuns,
    kept: TeacherFiles | TeacherMemory,
    process: tuple[int, int],
    show_progress: bool,
) -> None:
    """The runs of this process that are not there yet, batch by batch."""
    size = runs.recipe.sampling_batch_size
    batches = [part.plans[start : start + size] for start in range(0, len(part.plans), size)]
    for batch in tqdm(batches[process[0] :: process[1]], desc=f"{part.name} runs", disable=not show_progress):
        # Whole batches: among other rows a row may round differently.
        if not all(kept.has(part.name, plan.index) for plan in batch):
            for plan, rows in zip(batch, runs.make(part, batch), strict=True):
                kept.write(part.name, plan.index, rows)
