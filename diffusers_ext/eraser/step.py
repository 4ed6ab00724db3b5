"""One step of an eraser's training: the student against the teacher's velocities."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, pairwise, repeat
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.utils import broadcast
from diffusers import DiffusionPipeline
from torch.utils.checkpoint import checkpoint

from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.core.seeds import StepGenerator, draw_rows
from diffusers_ext.eraser.adapter.outputs import eraser_outputs
from diffusers_ext.eraser.attack import AdversarialPrompts
from diffusers_ext.eraser.batch import RowMaker, Rows, States
from diffusers_ext.eraser.losses import T2VUnlearningLoss, velocity_distance
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.teacher.runs import EraserText
from diffusers_ext.eraser.teacher.trajectory import teacher_trajectory
from diffusers_ext.families import find_family
from diffusers_ext.families.family import Family, Velocity
from diffusers_ext.families.text_conditioning import Text, repeat_text, token_embeds


class OnPolicyRollouts:
    """Samples clips with the eraser on, every `on_policy_every` steps, and keeps their states.

    What a training learns at the teacher's states need not hold where the student's errors lead it (Ross et al. 2011,
    arXiv 1011.0686). The teacher stays the one that answers. `size` are the arguments `num_frames`, `height` and
    `width` of the pipeline's call; `expert`, of a model with several transformers, the one that trains: states are of
    its timesteps. A `velocity` with first frames is needed for image-to-video models, which the runs take in turn.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        text: EraserText,
        recipe: EraserTraining,
        latent_shape: tuple[int, int, int, int],
        size: dict[str, int],
        expert: str | None = None,
        velocity: Velocity | None = None,
    ) -> None:
        self.pipeline, self.text, self.recipe = pipeline, text, recipe
        self.latent_shape, self.size = latent_shape, size
        family = find_family(pipeline, "eraser")
        given = {} if expert is None else {"expert": expert}
        self.velocity = family.velocity(pipeline, **size, **given) if velocity is None else velocity
        # Of the latents that the others' calls show, the model reads more, or scales them.
        reads_more = family.image_channels(self._denoiser.config) or not family.reports_steps
        scales = family.draws_pictures and not family.flow_matching
        self._draw = self._walked if reads_more or scales else self._drawn
        self._calls, self._states = 0, None

    @property
    def _denoiser(self) -> Any:
        return getattr(self.pipeline, find_family(self.pipeline, "eraser").denoiser)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        states = None if self._states is None else [part.cpu() for part in self._states]
        return {"calls": self._calls, "states": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        device = self._denoiser.device
        self._calls, states = state["calls"], state["states"]
        self._states = None if states is None else States(*(part.to(device) for part in states))

    def take(self, count: int, generator: torch.Generator) -> States:
        """Some states, after new runs where it is time for them."""
        drawn = torch.randint(2**62, (2,), generator=generator).tolist()
        if self._calls % self.recipe.on_policy_every == 0:
            self._states = self._run(drawn[0])
        self._calls += 1
        rows = StepGenerator()
        rows.manual_seed(drawn[1])
        rows.process = getattr(generator, "process", rows.process)
        chosen = draw_rows(partial(torch.randint, len(self._states.t)), (count,), rows)
        return States(*(part[chosen.to(part.device)] for part in self._states))

    def _run(self, seed: int) -> States:
        generator = torch.Generator().manual_seed(seed)
        count, device = self.recipe.sampling_batch_size, self._denoiser.device
        prompts = torch.randint(len(self.text.target), (count,), generator=generator)
        family, velocity = find_family(self.pipeline, "eraser"), self.velocity
        embeds = self.text.target[prompts.to(token_embeds(self.text.target).device)].to(device)
        # The dtype in which the pipeline itself would start.
        dtype = token_embeds(embeds).dtype
        latents = torch.randn((count, *velocity.state_shape(self.latent_shape)), generator=generator)
        latents = latents.to(device, velocity.latents_dtype or dtype)
        empty = repeat_text(self.text.empty.to(device, dtype), count)
        passed, times = self._draw(family, latents, embeds, empty, generator)
        times = times.to(device, torch.float32 if times.is_floating_point() else torch.int64)
        served = velocity.serves(times).nonzero().flatten().tolist()
        x_t = torch.cat([passed[step] for step in served]).float()
        states = States(x_t, times[served].repeat_interleave(count), prompts.to(device).repeat(len(served)))
        return States(*(broadcast(part) for part in states))  # checkpoints hold the first process's

    def _drawn(
        self, family: Family, latents: torch.Tensor, embeds: Text, empty: Text, generator: torch.Generator
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Latents before each step, and the timesteps, of the pipeline's own call."""
        passed: list[torch.Tensor] = [latents]

        def keep(_: Any, __: int, ___: Any, values: dict[str, torch.Tensor]) -> dict[str, Any]:
            passed.append(family.clip_latents(values["latents"], self.latent_shape))
            return {}

        scale = self.recipe.sampling_guidance_scale
        with quiet_run(self.pipeline), family.guided_call(self.pipeline, scale) as guidance:
            self.pipeline(
                **family.clip_arguments(embeds, empty, latents),
                generator=generator,
                num_inference_steps=self.recipe.num_inference_steps,
                **guidance,
                callback_on_step_end=keep,
                output_type="latent",
                **family.size_arguments(**self.size),
            )
            times = self.pipeline.scheduler.timesteps
        return passed, times

    def _walked(
        self, family: Family, latents: torch.Tensor, embeds: Text, empty: Text, generator: torch.Generator
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The same step by step, as the model reads them."""
        points = teacher_trajectory(
            self.velocity,
            self.pipeline.scheduler,
            latents,
            embeds,
            empty,
            num_inference_steps=self.recipe.num_inference_steps,
            guidance_scale=self.recipe.sampling_guidance_scale,
            generators=[generator] * len(latents),
            numbers=[self._calls + index for index in range(len(latents))],
            with_erasers=True,
        )
        passed, times = zip(*((point.x_t, point.t[0]) for point in points), strict=True)
        return list(passed), torch.stack(times)


Result = TypeVar("Result")


class Part(NamedTuple):
    """Rows of one pass of the student; `mask` is that of its target rows, where it is needed."""

    x_t: torch.Tensor
    t: torch.Tensor
    prompt_embeds: Text
    mask: torch.Tensor | None


class EraserStep:
    """The loss of an eraser, over a batch of teacher samples or of clean latents.

    `T2VUnlearningLoss` of rows whose velocities the teacher, the same model without erasers, has given. Target and
    preserved rows go through the student in one pass; target rows with learned embeddings, which make prompts longer,
    in a second one. With `separate_passes` each kind has its own pass, and all but the last are computed again for
    their gradients: one more forward of them, and the activations of one kind at a time.

    `rollouts` are for a recipe with `on_policy_share`, `adversarial_prompts` for one with `adversarial_share`;
    `adapter_name` is the eraser that trains.
    """

    def __init__(
        self,
        maker: RowMaker,
        recipe: EraserTraining,
        adapter_name: str,
        *,
        rollouts: OnPolicyRollouts | None = None,
        adversarial_prompts: AdversarialPrompts | None = None,
    ) -> None:
        self.maker, self.recipe, self.adapter_name = maker, recipe, adapter_name
        self.rollouts, self.adversarial_prompts = rollouts, adversarial_prompts
        self.loss = T2VUnlearningLoss(
            None,
            recipe.unlearning_weight,
            recipe.preservation_weight,
            recipe.localization_weight,
            recipe.negative_guidance,
            recipe.loss_type,
        )

    @property
    def stateful(self) -> list[Any]:
        """What a checkpoint has to keep besides the weights."""
        return [part for part in (self.rollouts, self.adversarial_prompts) if part is not None]

    def __call__(
        self, model: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """`loss` and its parts; `erased` is 0 for an untouched model and 1 where v_neg is reached."""
        known, count = self.maker.teacher_rows(batch, generator), 0
        if self.rollouts is not None:
            count = round(self.recipe.on_policy_share * len(known.target.t))
            states = self.rollouts.take(count, generator)
            known = self.maker.replace_target(known, states)
        rows = self.maker.rows(known)
        prompts = None
        if self.adversarial_prompts is not None:
            rows = self.adversarial_prompts.first(rows, count)
            prompts = self.adversarial_prompts.prompts(rows, generator)
        student = copy.copy(self.maker.velocity)
        student.transformer = model  # as accelerate has prepared it
        return self._losses(rows, *self._ask(student, rows, prompts))

    def _losses(self, rows: Rows, prediction: torch.Tensor, localized: torch.Tensor | None) -> dict[str, torch.Tensor]:
        n, terms = rows.num_target, {}
        weights = rows.weights[:, None, None, None, None] if self.recipe.weighs_rows else None
        for term, name, chosen in (
            (self.loss.unlearning, "unlearning", slice(None, n)),
            (self.loss.preservation, "preservation", slice(n, None)),
        ):
            if len(rows.t[chosen]):
                found = (prediction[chosen], rows.target_velocity[chosen])
                terms[name] = term.distance(*found, None if weights is None else weights[chosen])
        if localized is not None:
            terms["localization"] = localized
        losses = {"loss": self.loss.weighted_sum(terms), **terms}
        if n:
            with torch.no_grad():
                start = velocity_distance(rows.teacher_velocity, rows.target_velocity[:n], "l2")
                now = velocity_distance(prediction[:n].detach(), rows.target_velocity[:n], "l2")
                losses["erased"] = 1 - now / start.clamp_min(1e-12)
        return losses

    def _ask(
        self, student: Velocity, rows: Rows, prompts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The student's velocities, and what its erasers add outside of the mask; `prompts` are of the first rows."""
        again = copy.copy(student)
        # In the backward pass, the wrapper of distributed training must not begin a new step.
        again.transformer = student.model
        passes = [
            partial(self._ask_part, chain([student], repeat(again)), part) for part in self._parts(rows, prompts)
        ]
        separate = self.recipe.separate_passes
        answers = run_separately(passes) if separate else [ask() for ask in passes]
        localized = [found for _, found in answers if found is not None]
        return torch.cat([part for part, _ in answers]), localized[0] if localized else None

    def _parts(self, rows: Rows, prompts: torch.Tensor | None) -> list[Part]:
        """The passes of the student, in the order of the rows."""
        first, n = 0 if prompts is None else len(prompts), rows.num_target
        parts = [Part(rows.x_t[:first], rows.t[:first], prompts, None)] if first else []
        borders = [first, n, len(rows.t)] if self.recipe.separate_passes else [first, len(rows.t)]
        for start, stop in pairwise(borders):
            mask = None
            if self.recipe.localization_weight and start < n:
                if rows.mask is None:
                    raise ValueError("`localization_weight` must be 0 for samples without masks, got more.")
                mask = rows.mask[start:]
            if start < stop:
                chosen = slice(start, stop)
                parts.append(Part(rows.x_t[chosen], rows.t[chosen], rows.prompt_embeds[chosen], mask))
        return parts

    def _ask_part(self, velocities: Iterator[Velocity], part: Part) -> tuple[torch.Tensor, torch.Tensor | None]:
        velocity, mask = next(velocities), part.mask
        if mask is None:
            return velocity(*part[:3]), None

        def outside(name: str, output: torch.Tensor) -> torch.Tensor:
            return self.loss.localization.of_layer(output[: len(mask)], mask)

        transformer = self.maker.velocity.transformer
        with eraser_outputs(transformer, self.adapter_name, reduce=outside) as outputs:
            prediction = velocity(*part[:3])
        return prediction, torch.stack(list(outputs.values())).mean()


def run_separately(passes: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run passes so that one backward over all their results takes the memory of one of them.

    All but the last are computed again in the backward pass, which costs one more forward of each. The last keeps its
    activations: autograd goes backward from what was computed last, and has freed them when it comes to the others.
    Gradient checkpointing of blocks works inside as well. Each pass must compute the same whenever it is called; it
    sees the random numbers and the autocast of the first call again.
    """
    results = [checkpoint(run, use_reentrant=False) for run in passes[:-1]]
    return results + [run() for run in passes[-1:]]
