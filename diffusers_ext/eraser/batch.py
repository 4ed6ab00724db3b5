"""From a batch of samples to what the student is asked and what the teacher says about it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_ext.core.restored_state import eval_mode
from diffusers_ext.core.seeds import draw_rows, spread_rows
from diffusers_ext.eraser.concept_attention import concept_attention
from diffusers_ext.eraser.concept_masks import weighted_attention_mask
from diffusers_ext.eraser.losses import negative_velocity
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.teacher.collect import VelocityRows, teacher_velocities
from diffusers_ext.eraser.teacher.runs import EraserText, calibrate_heads
from diffusers_ext.eraser.teacher.store import EMPTY_PROMPT, first_process_has
from diffusers_ext.eraser.teacher.trajectory import run_timesteps
from diffusers_ext.families import find_family
from diffusers_ext.families.family import Velocity
from diffusers_ext.families.predictions import scheduler_level
from diffusers_ext.families.text_conditioning import (
    Text,
    join_texts,
    repeat_text,
    replace_rows,
    same_text,
    token_embeds,
)

logger = logging.getLogger(__name__)


def prompt_length(pipeline: DiffusionPipeline) -> int:
    """Tokens that the prompts of a pipeline are padded to."""
    return find_family(pipeline, "eraser").prompt_length(pipeline)


@torch.no_grad()
def encode_video_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], *, batch_size: int = 8) -> Text:
    """What a pipeline hands to its transformer: padded to full length, as the model reads it.

    `""` is the unconditional prompt; repeated ones are encoded once, `batch_size` at a time, in eval mode. Returns
    `(prompts, text, dim)` on the CPU, of the text encoder's dtype; a `TextConditioning` where text is more than that.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"`prompts` must be a list of at least one prompt, got {prompts!r}.")
    family, length = find_family(pipeline, "eraser"), prompt_length(pipeline)
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    unique = list(rows)
    ids = pipeline.tokenizer([family.clean_prompt(prompt) for prompt in unique], truncation=False).input_ids
    cut = [prompt for prompt, row in zip(unique, ids, strict=True) if len(row) > length]
    if cut:
        logger.warning(f"{len(cut)} prompts are cut at {length} tokens, the first is {cut[0]!r}.")
    encoded = []
    with eval_mode(pipeline):
        for start in tqdm(range(0, len(unique), batch_size), desc="encode prompts"):
            encoded.append(family.encode_clip_prompts(pipeline, unique[start : start + batch_size]).to("cpu"))
    embeds = join_texts(encoded)
    if not token_embeds(embeds).isfinite().all():
        raise ValueError(
            f"`text_encoder` must give finite embeddings, got others in {token_embeds(embeds).dtype}. Load it in "
            "bfloat16 or float32."
        )
    return embeds if len(unique) == len(prompts) else embeds[[rows[prompt] for prompt in prompts]]


class Rows(NamedTuple):
    """What the student is asked in one pass: target rows first, preserved rows after them."""

    x_t: torch.Tensor  # (rows, frames, channels, height, width) float32
    t: torch.Tensor
    prompt_embeds: Text  # (rows, text, dim)
    target_velocity: torch.Tensor  # to be reached, like `x_t`
    teacher_velocity: torch.Tensor  # of target rows
    weights: torch.Tensor  # (rows,), how much each counts
    mask: torch.Tensor | None  # of the concept, (target rows, frames, rows, columns) in [0, 1]

    @property
    def num_target(self) -> int:
        """How many rows are target rows."""
        return len(self.teacher_velocity)

    def with_first(self, chosen: Sequence[int]) -> Rows:
        """The same rows, these target rows before the others."""
        target = [*chosen, *sorted(set(range(self.num_target)) - set(chosen))]
        rows = [*target, *range(self.num_target, len(self.t))]
        return Rows(
            self.x_t[rows],
            self.t[rows],
            self.prompt_embeds[rows],
            self.target_velocity[rows],
            self.teacher_velocity[target],
            self.weights[rows],
            None if self.mask is None else self.mask[target],
        )


class States(NamedTuple):
    """Where velocities are asked for: x_t, timesteps and numbers of prompts, one entry a row."""

    x_t: torch.Tensor
    t: torch.Tensor
    prompts: torch.Tensor


class TeacherRows(NamedTuple):
    """States and what the teacher says there."""

    target: States
    preserved: States  # of which prompt -1 is the empty one
    v_concept: torch.Tensor  # at target states, as `v_anchor`
    v_anchor: torch.Tensor
    v_preserved: torch.Tensor  # at preserved states
    mask: torch.Tensor | None  # as in `Rows`


def rows_of_each_kind(batch_size: int, preserved_share: float) -> tuple[int, int]:
    """Target and preserved rows taken of a batch that has `batch_size` of each.

    Of the kind with the larger share all are taken; of the other as many as its share leaves, at least one unless its
    share is 0.
    """
    larger = max(preserved_share, 1 - preserved_share)
    smaller = round(batch_size * (1 - larger) / larger)
    if larger < 1:
        smaller = max(1, smaller)
    return (batch_size, smaller) if preserved_share <= 0.5 else (smaller, batch_size)


class RowMaker:
    """Rows of teacher samples as they were kept, or of clean latents with one pass of the teacher.

    Args:
        velocity: of the model that trains, not prepared by accelerate; without erasers it is the teacher.
        grid: (frames, rows, columns) of the video tokens.
        token_mask: `(target prompts, text)` bool, the concept's tokens; needed for masks that are not kept with the
            samples.
        head_weights: `(layers, heads)` of the masks that are kept with the samples; where there are none they are
            found before the first mask is made, from the recipe's seed.
    """

    def __init__(
        self,
        velocity: Velocity,
        text: EraserText,
        recipe: EraserTraining,
        device: torch.device,
        *,
        grid: tuple[int, int, int],
        scheduler: Any,
        token_mask: torch.Tensor | None = None,
        head_weights: torch.Tensor | None = None,
    ) -> None:
        asked = recipe.latents_source != "trajectory" or recipe.on_policy_share
        if recipe.localization_weight and asked and token_mask is None:
            raise ValueError("`token_mask` must be given where `localization_weight` is not 0, got none.")
        self.velocity, self.text, self.recipe, self.device = velocity, text, recipe, device
        self.grid, self.scheduler = grid, scheduler
        self.token_mask, self._head_weights = token_mask, head_weights

    def teacher_rows(self, batch: dict[str, Any], generator: torch.Generator) -> TeacherRows:
        """Rows of a batch of `TeacherSamples`, or over clean latents `batch["x_0"]`."""
        return self._kept(batch) if "target" in batch else self._noised(batch, generator)

    def replace_target(self, rows: TeacherRows, states: States) -> TeacherRows:
        """Put other states, first, in the place of some target rows; the teacher is asked about them."""
        total = len(rows.target.t)
        kept = sorted(set(range(total)) - set(spread_rows(len(states.t), total)))
        nothing = States(*(part[:0] for part in rows.preserved))
        v_concept, v_anchor, _, mask = self.ask_teacher(states, nothing)

        def join(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
            return torch.cat([new, old[kept]])

        return rows._replace(
            target=States(*map(join, states, rows.target)),
            v_concept=join(v_concept, rows.v_concept),
            v_anchor=join(v_anchor, rows.v_anchor),
            mask=None if rows.mask is None else join(mask, rows.mask),
        )

    def ask_teacher(
        self, target: States, preserved: States
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(concept, anchor, preserved) velocities, and the concept's mask if it is needed.

        They come from one pass, or from one after the other with `separate_passes`. For masks the empty prompt is
        asked for as well, unless it is the anchor.
        """
        states = (target, target, preserved)
        embeds = (
            self._take(self.text.target, target.prompts),
            self._take(self.text.anchor, target.prompts),
            self._take_preserved(preserved.prompts),
        )
        rows = [(s.x_t, s.t, text) for s, text in zip(states, embeds)]
        if not self.recipe.localization_weight:
            return (*self._ask(rows), None)
        empty = self._empty(embeds[1])
        if not same_text(embeds[1], empty):
            rows.append((target.x_t, target.t, empty))
        shape = self.velocity.without_image(target.x_t).shape[1:]
        tokens, weights = self.token_mask[target.prompts.cpu()], self._heads(shape)
        # Attention is read in the first group of rows alone; the others have no concept token.
        others = 0 if self.recipe.separate_passes else sum(len(t) for _, t, _ in rows[1:])
        read = torch.cat([tokens, tokens.new_zeros(others, tokens.shape[1])])
        transformer = self.velocity.transformer
        with concept_attention(transformer, read, head_weights=weights) as attention:
            velocities = self._ask(rows[:1] if self.recipe.separate_passes else rows)
            maps = attention.maps[: len(tokens)]
        if self.recipe.separate_passes:
            velocities += self._ask(rows[1:])
        (v_concept, v_anchor, v_preserved), v_empty = velocities[:3], velocities[3:]
        found = (maps, v_concept, v_anchor, tokens, self.grid, *v_empty)
        mask = weighted_attention_mask(*found, threshold=self.recipe.mask_threshold)
        return v_concept, v_anchor, v_preserved, mask

    def rows(self, known: TeacherRows) -> Rows:
        """What the student is asked, and what it is to answer."""
        target, preserved = known.target, known.preserved
        eta = self.recipe.negative_guidance
        v_negative = negative_velocity(known.v_anchor, known.v_concept, eta)
        embeds = [self._take(self.text.target, target.prompts), self._take_preserved(preserved.prompts)]
        t = torch.cat([target.t, preserved.t])
        low, high = self.recipe.timestep_range
        weights = ((t >= low) & (t <= high)).float()
        empty = preserved.prompts == EMPTY_PROMPT
        weights[len(target.t) :] *= torch.where(empty, self.recipe.empty_weight, 1.0)
        return Rows(
            torch.cat([target.x_t, preserved.x_t]),
            t,
            join_texts(embeds),
            torch.cat([v_negative, known.v_preserved]),
            known.v_concept,
            weights,
            known.mask,
        )

    def _kept(self, batch: dict[str, Any]) -> TeacherRows:
        num_target, num_preserved = self._rows_of_each_kind(len(batch["target"]["t"]))
        target = self._moved(batch["target"], num_target)
        preserved = self._moved(batch["preserved"], num_preserved)
        return TeacherRows(
            States(target["x_t"], target["t"], target["prompt"]),
            States(preserved["x_t"], preserved["t"], preserved["prompt"]),
            target["v_concept"],
            target["v_anchor"],
            preserved["velocity"],
            target.get("mask"),
        )

    def _noised(self, batch: dict[str, Any], generator: torch.Generator) -> TeacherRows:
        x_0 = batch["x_0"].to(self.device, torch.float32)
        num_target, num_preserved = self._rows_of_each_kind(len(x_0))
        rows = [_some(x_0, count) for count in (num_target, num_preserved)]
        target = self._add_noise(rows[0], len(self.text.target), generator)
        preserved = self._add_noise(rows[1], len(self.text.preserved), generator)
        empty = draw_rows(torch.rand, (num_preserved,), generator) < self.recipe.empty_share
        numbers = preserved.prompts.masked_fill(empty.to(self.device), EMPTY_PROMPT)
        preserved = preserved._replace(prompts=numbers)
        return TeacherRows(target, preserved, *self.ask_teacher(target, preserved))

    def _rows_of_each_kind(self, batch_size: int) -> tuple[int, int]:
        # Preserved rows without weight would be asked for nothing.
        share = self.recipe.preserved_share if self.recipe.preservation_weight else 0.0
        return rows_of_each_kind(batch_size, share)

    def _ask(self, rows: list[VelocityRows]) -> list[torch.Tensor]:
        """The teacher's velocities of several groups of rows."""
        if self.recipe.separate_passes and len(rows) > 1:
            return [velocity for row in rows for velocity in self._ask([row])]
        if not any(len(t) for _, t, _ in rows):
            return [self.velocity.without_image(x_t) for x_t, _, _ in rows]  # no rows, no velocities
        return teacher_velocities(self.velocity, self.velocity, rows)

    def _heads(self, latent_shape: Sequence[int]) -> torch.Tensor:
        if self._head_weights is None:
            given = (self.text, self.token_mask, self.recipe, latent_shape)
            found = calibrate_heads(self.velocity, self.scheduler, *given, show_progress=False)
            self._head_weights = first_process_has(found)
        return self._head_weights

    def _take(self, embeds: Text, prompts: torch.Tensor) -> Text:
        return embeds[prompts.to(token_embeds(embeds).device)].to(self.device)

    def _take_preserved(self, prompts: torch.Tensor) -> Text:
        chosen = self._take(self.text.preserved, prompts.clamp_min(0))
        return replace_rows(chosen, prompts == EMPTY_PROMPT, self._empty(chosen))

    def _empty(self, like: Text) -> Text:
        """The empty prompt for each row of a text."""
        tokens = token_embeds(like)
        return repeat_text(self.text.empty.to(tokens.device, tokens.dtype), len(tokens))

    def _moved(self, part: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
        """Some rows of a part of a batch on the device, latents in float32."""
        return {
            name: _some(value, count).to(self.device, torch.float32 if value.dim() > 1 else None)
            for name, value in part.items()
        }

    def _add_noise(self, x_0: torch.Tensor, num_prompts: int, generator: torch.Generator) -> States:
        """x_t of clean latents at drawn timesteps, with drawn prompts; channels of an image stay as they are."""
        rows, clean = (len(x_0),), self.velocity.without_image(x_0)
        t = self._draw_timesteps(len(x_0), clean.shape[1:], generator).to(self.device)
        prompts = draw_rows(partial(torch.randint, num_prompts), rows, generator).to(self.device)
        noise = draw_rows(torch.randn, clean.shape, generator).to(self.device)
        if self.velocity.flow_matching:
            signal, sigma = scheduler_level(self.scheduler, t, clean, flow_matching=True)
            x_t = signal * clean + sigma * noise
        else:
            x_t = self.scheduler.add_noise(clean, noise, t)
        image = x_0[:, :, clean.shape[2] :]
        x_t = torch.cat([x_t, image], dim=2) if image.shape[2] else self.velocity.with_image(x_t, prompts.tolist())
        return States(x_t, t, prompts)

    def _draw_timesteps(self, count: int, latent_shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Of the recipe's range; of flow matching, those that the sampler has there, crowded as its shift has it."""
        low, high = self.recipe.min_timestep, self.recipe.max_timestep
        if not self.velocity.flow_matching:
            return draw_rows(partial(torch.randint, low, high + 1), (count,), generator)
        times = run_timesteps(self.velocity, self.scheduler, self.recipe.num_inference_steps, latent_shape)
        low, high = self.recipe.timestep_range
        served = times[self.velocity.serves(times) & (times >= low) & (times <= high)]
        if not len(served):
            raise ValueError(
                f"`min_timestep` and `max_timestep` must leave some timestep of a run, got {low} and {high} of "
                f"{[round(float(t)) for t in times]}."
            )
        return served[draw_rows(partial(torch.randint, len(served)), (count,), generator)]


def _some(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """`spread_rows` of a tensor; no copy where they are all."""
    return tensor if count == len(tensor) else tensor[spread_rows(count, len(tensor))]
