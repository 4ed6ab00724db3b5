"""What methods that erase at inference share: a video denoiser's calls for known prompts, changed on both sides.

A method knows prompts beforehand, and finds the rows of a call that ask for one by its text, so that it works where a
pipeline asks for both sides of classifier-free guidance at once (CogVideoX) and where it asks one by one (Wan), and
also where an attack puts embeddings after a prompt. What it answers on these rows is the velocity that guidance then
takes for the prompt's own; the other rows are left as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.families import match_family

_SAME = 1e-4  # share of a text's norm that two encodings of one prompt may differ by


class GuardedCalls:
    """A method that changes nothing; the others say what.

    Args:
        pipeline: of text to video.
        concept: to be erased.
        max_sequence_length: of the pipeline's calls, in tokens.
        num_inference_steps: of the pipeline's calls.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, concept: str, *, max_sequence_length: int, num_inference_steps: int
    ) -> None:
        self.pipeline, self.concept, self.length = pipeline, concept, max_sequence_length
        scheduler = copy.deepcopy(pipeline.scheduler)
        scheduler.set_timesteps(num_inference_steps)
        self.timesteps = scheduler.timesteps
        self.empty, self.of_concept = self.encode(["", concept]).split(1)
        self.prompts: list[str] = []
        self._embeds = self.empty[:0]
        self._real = self.empty[:0, :, 0] > 0

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """What the pipeline hands its denoiser for prompts, `(prompts, tokens, width)`."""
        return self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.length
        )[0]

    def know(self, prompts: Sequence[str]) -> None:
        """Prompts whose rows are to be changed from now on."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.prompts]
        if not new:
            return
        embeds, family = self.encode(new), match_family(self.pipeline)
        counts = torch.tensor([len(family.token_ids(self.pipeline, prompt)[0]) for prompt in new])
        real = torch.arange(embeds.shape[1]) < counts.clamp(max=embeds.shape[1])[:, None]
        self.prompts += new
        self._embeds, self._real = torch.cat([self._embeds, embeds]), torch.cat([self._real, real])
        self.learn(new, embeds, real)

    def learn(self, prompts: Sequence[str], embeds: torch.Tensor, real: torch.Tensor) -> None:
        """Whatever a method must know of new prompts; `real` marks the tokens that are no padding."""

    def text(self, text: torch.Tensor, prompts: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """The text `(rows, tokens, width)` that is asked for in place of the prompts of these numbers."""
        return text

    def further(self) -> list[torch.Tensor]:
        """Texts `(1, tokens, width)` that are asked for besides, at the same latents."""
        return []

    def answer(self, told: torch.Tensor, others: Sequence[torch.Tensor], steps: torch.Tensor) -> torch.Tensor:
        """The velocity for the prompts, from what the model said for them and for `further`."""
        return told

    @contextmanager
    def active(self) -> Iterator[None]:
        """The denoiser with its calls changed; its hooks are gone on leaving, also after an exception."""
        denoiser = self.pipeline.transformer
        hooks = [
            denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            denoiser.register_forward_hook(self._after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def rows_of(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows of a call ask for a known prompt, and its number; embeddings behind the prompts do not count."""
        if not self.prompts:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        known, real = self._embeds.to(text), self._real.to(text)[..., None]
        apart = ((text.detach()[:, None, : known.shape[1]] - known) * real).flatten(2).norm(dim=2)
        nearest = apart.min(dim=1)
        norms = (known * real).flatten(1).norm(dim=1)[nearest.indices]
        rows = (nearest.values < _SAME * norms).nonzero()[:, 0]
        return rows, nearest.indices[rows]

    def steps_of(self, timesteps: torch.Tensor) -> torch.Tensor:
        """How many steps of a run lie before timesteps."""
        return (self.timesteps > timesteps[:, None] + 1e-3).sum(dim=1)

    def _before(self, _: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        text, self._steps = kwargs["encoder_hidden_states"], self.steps_of(kwargs["timestep"])
        self.rows, prompts = self.rows_of(text)
        self.num_rows, self.text_length = len(text), text.shape[1]
        if not len(self.rows):
            return args, kwargs
        asked = text.clone()
        asked[self.rows] = self.text(text[self.rows], prompts, self._steps[self.rows])
        added = [_longer(one.to(text), self.text_length).expand(len(self.rows), -1, -1) for one in self.further()]
        again = self.rows.repeat(len(added))
        changed = {"encoder_hidden_states": torch.cat([asked, *added])}
        for name in ("hidden_states", "timestep"):
            changed[name] = torch.cat([kwargs[name], kwargs[name][again]])
        return args, {**kwargs, **changed}

    def _after(self, _: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if not len(self.rows):
            return output
        own, added = output[0][: self.num_rows].clone(), output[0][self.num_rows :]
        others = added.chunk(len(added) // len(self.rows)) if len(added) else []
        own[self.rows] = self.answer(own[self.rows], others, self._steps[self.rows])
        return (own,) if isinstance(output, tuple) else type(output)(sample=own)


def _longer(text: torch.Tensor, length: int) -> torch.Tensor:
    """A text whose last token, padding, is repeated up to a length."""
    return torch.cat([text, text[:, -1:].expand(-1, length - text.shape[1], -1)], dim=1)


class NegativePrompt(GuardedCalls):
    """The concept in place of the empty prompt of classifier-free guidance, said as a change of the prompt's velocity.

        v_n + g (v_c - v_n)  =  v_u + g (v' - v_u)   for   v' = v_c - (1 - 1 / g) (v_n - v_u)

    Pipelines do so by themselves and for nothing; this form is for what asks for the velocity alone, such as attacks.
    """

    def __init__(self, pipeline: DiffusionPipeline, concept: str, *, guidance_scale: float, **sizes: int) -> None:
        super().__init__(pipeline, concept, **sizes)
        self.guidance_scale = guidance_scale

    def further(self) -> list[torch.Tensor]:
        """Of the concept and of nothing."""
        return [self.of_concept, self.empty]

    def answer(self, told: torch.Tensor, others: Sequence[torch.Tensor], steps: torch.Tensor) -> torch.Tensor:
        """`v'` of the equation."""
        named, without = others
        return told - (1 - 1 / self.guidance_scale) * (named - without)
