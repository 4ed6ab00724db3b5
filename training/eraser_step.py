"""One step of an eraser's training: the student against teacher velocities, kept or asked for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from diffusers_ext.eraser.concept_attention import concept_attention
from diffusers_ext.eraser.masks import normalize_attention
from diffusers_ext.eraser.outputs import eraser_outputs
from diffusers_ext.eraser.teacher import teacher_velocities
from diffusers_ext.eraser.teacher_samples import EMPTY_PROMPT
from diffusers_ext.eraser.velocity import CogVideoXVelocity
from diffusers_ext.eraser.velocity_losses import (
    layer_localization,
    negative_velocity,
    velocity_distance,
)
from training.eraser_recipe import EraserTraining
from training.eraser_rows import EraserText, Rows, States, rows_of_each_kind


class EraserStep:
    """The loss of an eraser, over a batch of teacher samples or of clean latents.

    `L = w_u ||v_neg - v_student(x_t, t, concept)||^2 + w_p ||v_teacher - v_student(preserved)||^2 + w_l L_loc`
    with `v_neg = v_anchor - eta (v_concept - v_anchor)` of the teacher, the same model without erasers
    (T2VUnlearning, arXiv 2505.17550, section 4). Target and preserved rows go through the student in one pass.

    Args:
        velocity: of the model that trains, not prepared by accelerate.
        text: embeddings of the prompts, anywhere.
        recipe: weights and options.
        device: where the model is.
        adapter_name: the eraser that trains.
        grid: (frames, rows, columns) of the video tokens.
        scheduler: adds noise to clean latents.
        token_mask: `(target prompts, text)` bool, the concept's tokens; needed for masks of clean latents.
    """

    def __init__(
        self,
        velocity: CogVideoXVelocity,
        text: EraserText,
        recipe: EraserTraining,
        device: torch.device,
        *,
        adapter_name: str,
        grid: tuple[int, int, int],
        scheduler: Any,
        token_mask: torch.Tensor | None = None,
    ) -> None:
        if recipe.localization_weight and recipe.latents_source != "trajectory":
            if token_mask is None:
                raise ValueError(
                    "`token_mask` must be given where `localization_weight` is not 0, got none."
                )
        self.velocity, self.text, self.recipe, self.device = velocity, text, recipe, device
        self.adapter_name, self.grid, self.scheduler = adapter_name, grid, scheduler
        self.token_mask = token_mask

    def __call__(
        self, model: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """`loss` and its parts; `erased` is 0 for an untouched model and 1 where v_neg is reached."""
        rows = self.kept_rows(batch) if "target" in batch else self.live_rows(batch, generator)
        student = copy.copy(self.velocity)
        student.transformer = model  # as accelerate has prepared it
        recipe, n = self.recipe, rows.num_target
        prediction, localized = self._ask(student, rows)
        losses = {}
        if n:
            losses["unlearning"] = self._distance(prediction, rows, slice(None, n))
        if n < len(rows.x_t):
            losses["preservation"] = self._distance(prediction, rows, slice(n, None))
        if localized is not None:
            losses["localization"] = localized
        weights = {
            "unlearning": recipe.unlearning_weight,
            "preservation": recipe.preservation_weight,
            "localization": recipe.localization_weight,
        }
        total = sum(weights[name] * value for name, value in losses.items())
        losses = {"loss": total, **losses}
        if n:
            with torch.no_grad():
                start = velocity_distance(rows.unerased, rows.wanted[:n], "l2")
                now = velocity_distance(prediction[:n].detach(), rows.wanted[:n], "l2")
                losses["erased"] = 1 - now / start.clamp_min(1e-12)
        return losses

    def kept_rows(self, batch: dict[str, Any]) -> Rows:
        """Rows of a batch of `TeacherSamples`."""
        count = len(batch["target"]["t"])
        num_target, num_preserved = rows_of_each_kind(count, self.recipe.preserved_share)
        target = self._moved(batch["target"], num_target)
        preserved = self._moved(batch["preserved"], num_preserved)
        return self._rows(
            States(target["x_t"], target["t"], target["prompt"]),
            States(preserved["x_t"], preserved["t"], preserved["prompt"]),
            (target["v_concept"], target["v_anchor"], preserved["velocity"]),
            target.get("mask"),
        )

    def live_rows(self, batch: dict[str, Any], generator: torch.Generator) -> Rows:
        """Rows over noised clean latents `batch["x_0"]`, with one pass of the teacher."""
        x_0 = batch["x_0"].to(self.device, torch.float32)
        num_target, num_preserved = rows_of_each_kind(len(x_0), self.recipe.preserved_share)
        target = self._noised(x_0[:num_target], len(self.text.target), generator)
        preserved = self._noised(x_0[:num_preserved], len(self.text.preserved), generator)
        empty = torch.rand(num_preserved, generator=generator) < self.recipe.empty_share
        numbers = preserved.prompts.masked_fill(empty.to(self.device), EMPTY_PROMPT)
        preserved = preserved._replace(prompts=numbers)
        velocities, mask = self.ask_teacher(target, preserved)
        return self._rows(target, preserved, velocities, mask)

    def ask_teacher(
        self, target: States, preserved: States
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """(concept, anchor, preserved) velocities in one pass, and the concept's mask if it is needed."""
        states = (target, target, preserved)
        embeds = (
            self._take(self.text.target, target.prompts),
            self._take(self.text.anchor, target.prompts),
            self._preserved(preserved.prompts),
        )
        rows = [(s.x_t, s.t, text) for s, text in zip(states, embeds)]
        if not self.recipe.localization_weight:
            return teacher_velocities(self.velocity, self.velocity, rows), None
        n = len(target.t)
        concept = self.token_mask[target.prompts.cpu()]
        tokens = concept.new_zeros(sum(len(s.t) for s in states), concept.shape[1])
        tokens[:n] = concept
        with concept_attention(self.velocity.transformer, tokens) as attention:
            velocities = teacher_velocities(self.velocity, self.velocity, rows)
        return velocities, normalize_attention(
            attention.maps[:n], self.grid, self.recipe.mask_threshold
        )

    def _ask(
        self, student: CogVideoXVelocity, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The student's velocities, and what its erasers add outside of the mask."""
        inputs = rows.x_t, rows.t, rows.prompt_embeds
        if not self.recipe.localization_weight or not rows.num_target:
            return student(*inputs).float(), None
        if rows.mask is None:
            raise ValueError("`localization_weight` must be 0 for samples without masks, got more.")

        def outside(name: str, output: torch.Tensor) -> torch.Tensor:
            return layer_localization(output[: rows.num_target], rows.mask, self.recipe.loss_type)

        transformer = self.velocity.transformer
        with eraser_outputs(transformer, self.adapter_name, reduce=outside) as outputs:
            prediction = student(*inputs).float()
        return prediction, torch.stack(list(outputs.values())).mean()

    def _distance(self, prediction: torch.Tensor, rows: Rows, chosen: slice) -> torch.Tensor:
        weights = rows.weights[chosen, None, None, None, None] if self.recipe.weighs_rows else None
        return velocity_distance(
            prediction[chosen], rows.wanted[chosen], self.recipe.loss_type, weights
        )

    def _rows(
        self,
        target: States,
        preserved: States,
        velocities: Sequence[torch.Tensor],
        mask: torch.Tensor | None,
    ) -> Rows:
        v_concept, v_anchor, v_preserved = velocities
        v_negative = negative_velocity(v_anchor, v_concept, self.recipe.guidance_scale)
        embeds = [self._take(self.text.target, target.prompts), self._preserved(preserved.prompts)]
        t = torch.cat([target.t, preserved.t])
        counts = (t >= self.recipe.min_timestep) & (t <= self.recipe.max_timestep)
        weights = counts.float()
        empty = preserved.prompts == EMPTY_PROMPT
        weights[len(target.t) :][empty] *= self.recipe.empty_weight
        return Rows(
            torch.cat([target.x_t, preserved.x_t]),
            t,
            torch.cat(embeds),
            torch.cat([v_negative, v_preserved]),
            v_concept,
            weights,
            mask,
        )

    def _take(self, embeds: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        return embeds[prompts.to(embeds.device)].to(self.device)

    def _preserved(self, prompts: torch.Tensor) -> torch.Tensor:
        chosen = self._take(self.text.preserved, prompts.clamp_min(0))
        empty = self.text.empty.to(chosen)
        return torch.where((prompts == EMPTY_PROMPT)[:, None, None], empty, chosen)

    def _moved(self, part: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
        """The first rows of a part of a batch on the device, latents in float32."""
        return {
            name: value[:count].to(self.device, torch.float32 if value.dim() > 1 else None)
            for name, value in part.items()
        }

    def _noised(self, x_0: torch.Tensor, num_prompts: int, generator: torch.Generator) -> States:
        """x_t of clean latents at drawn timesteps, with drawn prompts."""
        rows = (len(x_0),)
        low, high = self.recipe.min_timestep, self.recipe.max_timestep
        t = torch.randint(low, high + 1, rows, generator=generator).to(self.device)
        prompts = torch.randint(num_prompts, rows, generator=generator).to(self.device)
        noise = torch.randn(x_0.shape, generator=generator).to(self.device)
        return States(self.scheduler.add_noise(x_0, noise, t), t, prompts)
