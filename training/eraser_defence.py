"""Learned embeddings that try to bring the concept back, for the eraser to be trained against."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import broadcast

from diffusers_ext.eraser.velocity import CogVideoXVelocity
from diffusers_ext.evaluation.concept_revival import insert_embeddings, learn_revival_embeddings
from training.eraser_recipe import EraserTraining
from training.eraser_rows import Rows


class RevivalDefence:
    """Attacks the eraser every `adversarial_every` steps and keeps the latest embeddings.

    As Receler's adversarial prompt learning (arXiv 2311.17717, section 3.3), but the attack is made
    seldom and used often: its 50 passes before every step are out of reach for video models.

    Args:
        velocity: of the model that trains, not prepared by accelerate.
        recipe: share, interval, steps and number of embeddings.
    """

    def __init__(self, velocity: CogVideoXVelocity, recipe: EraserTraining) -> None:
        self.velocity, self.recipe = velocity, recipe
        self._calls = 0
        self._sets: list[torch.Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"calls": self._calls, "sets": [embeds.cpu() for embeds in self._sets]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        device = self.velocity.model.device
        self._calls, self._sets = state["calls"], [embeds.to(device) for embeds in state["sets"]]

    def prompts(self, rows: Rows, generator: torch.Generator) -> torch.Tensor | None:
        """Prompts of the first target rows with embeddings of one attack; `None` before the first.

        The eraser has to do something before it can be attacked, so the first interval has none.
        """
        seed, drawn = torch.randint(2**31, (2,), generator=generator).tolist()
        if self._calls and self._calls % self.recipe.adversarial_every == 0:
            self._attack(rows, seed)
        self._calls += 1
        count = round(self.recipe.adversarial_share * rows.num_target)
        if not self._sets or not count:
            return None
        embeds = self._sets[drawn % len(self._sets)]
        return insert_embeddings(rows.prompt_embeds[:count], embeds, self.velocity.config)

    def _attack(self, rows: Rows, seed: int) -> None:
        chosen = slice(None, rows.num_target)
        found = learn_revival_embeddings(
            self.velocity,
            rows.x_t[chosen],
            rows.t[chosen],
            rows.prompt_embeds[chosen],
            v_concept=rows.unerased,
            num_embeddings=self.recipe.num_adversarial_embeddings,
            steps=self.recipe.adversarial_steps,
            batch_size=rows.num_target,
            seed=seed,
        )
        self._sets.append(broadcast(found.embeddings))  # checkpoints hold the first process's
        del self._sets[: -self.recipe.num_adversarial_sets]
