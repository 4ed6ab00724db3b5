"""States on the student's own way to clips of the concept, made anew now and then in training."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import broadcast
from diffusers import DiffusionPipeline

from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.eraser.batch import EraserText, States
from diffusers_ext.eraser.recipe import EraserTraining


class OnPolicyRollouts:
    """Samples clips with the eraser on, every `on_policy_every` steps, and keeps their states.

    What a training learns at the teacher's states need not hold where the student's errors lead it (Ross et al. 2011,
    arXiv 1011.0686). The teacher stays the one that answers. `size` are the arguments `num_frames`, `height` and
    `width` of the pipeline's call.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        text: EraserText,
        recipe: EraserTraining,
        latent_shape: tuple[int, int, int, int],
        size: dict[str, int],
    ) -> None:
        self.pipeline, self.text, self.recipe = pipeline, text, recipe
        self.latent_shape, self.size = latent_shape, size
        self._calls, self._states = 0, None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        states = None if self._states is None else [part.cpu() for part in self._states]
        return {"calls": self._calls, "states": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        device = self.pipeline.transformer.device
        self._calls, states = state["calls"], state["states"]
        self._states = None if states is None else States(*(part.to(device) for part in states))

    def take(self, count: int, generator: torch.Generator) -> States:
        """Some states, after new runs where it is time for them."""
        drawn = torch.randint(2**62, (2,), generator=generator).tolist()
        if self._calls % self.recipe.on_policy_every == 0:
            self._states = self._run(drawn[0])
        self._calls += 1
        rows = torch.Generator().manual_seed(drawn[1])
        chosen = torch.randint(len(self._states.t), (count,), generator=rows)
        return States(*(part[chosen.to(part.device)] for part in self._states))

    def _run(self, seed: int) -> States:
        generator = torch.Generator().manual_seed(seed)
        count, device = self.recipe.sampling_batch_size, self.pipeline.transformer.device
        prompts = torch.randint(len(self.text.target), (count,), generator=generator)
        # The dtype in which the pipeline itself would start.
        embeds = self.text.target[prompts.to(self.text.target.device)].to(device)
        latents = torch.randn((count, *self.latent_shape), generator=generator)
        latents = latents.to(device, embeds.dtype)
        passed: list[torch.Tensor] = [latents]

        def keep(_: Any, __: int, ___: Any, values: dict[str, torch.Tensor]) -> dict[str, Any]:
            passed.append(values["latents"])
            return {}

        with quiet_run(self.pipeline):
            self.pipeline(
                prompt_embeds=embeds,
                negative_prompt_embeds=self.text.empty.to(embeds).expand_as(embeds),
                latents=latents,
                generator=generator,
                num_inference_steps=self.recipe.num_inference_steps,
                guidance_scale=self.recipe.sampling_guidance_scale,
                max_sequence_length=embeds.shape[1],
                callback_on_step_end=keep,
                output_type="latent",
                **self.size,
            )
            times = self.pipeline.scheduler.timesteps
        x_t = torch.cat(passed[: len(times)]).float()
        states = States(
            x_t, times.to(device, torch.int64).repeat_interleave(count), prompts.to(device).repeat(len(times))
        )
        return States(*(broadcast(part) for part in states))  # checkpoints hold the first process's
