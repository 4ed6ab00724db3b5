"""What is evaluated: a golden-noise network, or the re-denoised target that networks learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.families.text_conditioning import TextConditioning
from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork
from diffusers_ext.golden_noise.noise_statistics import match_spectrum
from diffusers_ext.golden_noise.redenoise import redenoise_sequence

Refine = Callable[[torch.Tensor, TextConditioning], torch.Tensor]

_PROBES = 16  # weights of a fingerprint; a report is read by people
_RESERVED = ("standard", "best of", "score")  # other rows of the report


class RedenoisedTarget:
    """The re-denoised noise itself, which networks learn to predict; called like a network.

    Its spectrum is matched to the noise it came from, as a network's output is.

    Args:
        pipeline: whose denoiser is asked, twice a repeat.
        repeats: how often the step is repeated.
        num_steps: inference steps of the schedule that sets the strength.
        w1, w2: guidance on the way down and up.
        legacy_inversion: the published off-by-one form.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        repeats: int = 1,
        *,
        num_steps: int = 10,
        w1: float = 5.5,
        w2: float = 1.0,
        legacy_inversion: bool = False,
    ) -> None:
        if repeats < 1:
            raise ValueError(f"`repeats` must be at least 1, got {repeats}.")
        self.pipeline, self.repeats = pipeline, repeats
        self.step = {"num_steps": num_steps, "w1": w1, "w2": w2, "legacy_inversion": legacy_inversion}

    @property
    def facts(self) -> dict[str, Any]:
        """What the evaluation's report says about it."""
        return {"repeats": self.repeats, **self.step}

    def __call__(self, noise: torch.Tensor, text: TextConditioning) -> torch.Tensor:
        """Golden noise of unit `noise` `(batch, channels, height, width)`, float32."""
        sequence = redenoise_sequence(self.pipeline, noise, text, repeats=self.repeats, **self.step)
        return match_spectrum(sequence[:, -1], noise)


class NetworkRefiner:
    """A network called with a `TextConditioning`; `scale` 0 leaves the noise as it is, 1 is its output."""

    def __init__(self, network: GoldenNoiseNetwork, scale: float = 1.0) -> None:
        self.network, self.scale = network, scale

    @property
    def facts(self) -> dict[str, Any]:
        """What the evaluation's report says about it."""
        parameters = list(self.network.parameters())
        return {
            "class": type(self.network).__name__,
            "name_or_path": str(self.network.config.get("_name_or_path") or ""),
            "golden_noise_scale": self.scale,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "parameter_bytes": sum(p.numel() * p.element_size() for p in parameters),
            "fingerprint": fingerprint(self.network, _PROBES),
        }

    def __call__(self, noise: torch.Tensor, text: TextConditioning) -> torch.Tensor:
        """Golden noise of unit `noise` `(batch, channels, height, width)`, float32."""
        return self.network.refine(
            noise,
            text.prompt_embeds,
            attention_mask=text.attention_mask,
            pooled_prompt_embeds=text.pooled_prompt_embeds,
            scale=self.scale,
        )


def name_subjects(
    refine: GoldenNoiseNetwork | Refine | Mapping[str, GoldenNoiseNetwork | Refine] | None, scale: float = 1.0
) -> dict[str, Refine]:
    """What is evaluated, by name (one alone is `"golden"`), all called as `refine(noise, text)`."""
    found = refine if isinstance(refine, Mapping) else {"golden": refine}
    if refine is None or not found:
        raise ValueError("`refine` must be a golden-noise network or a function of noise and text, got none.")
    subjects: dict[str, Refine] = {}
    for name, subject in found.items():
        if not name or "/" in name or name.startswith(_RESERVED):
            raise ValueError(
                f"`refine` must have names without '/' that do not start with one of {_RESERVED}, got {name!r}."
            )
        is_network = isinstance(subject, GoldenNoiseNetwork)
        if not is_network and not callable(subject):
            raise TypeError(
                "`refine` must hold golden-noise networks or functions of noise and text, got "
                f"{type(subject).__name__} for {name!r}."
            )
        subjects[name] = NetworkRefiner(subject, scale) if is_network else subject
    return subjects
