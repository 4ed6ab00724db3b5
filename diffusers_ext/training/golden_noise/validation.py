"""Figures of a golden-noise network on held-out and on trained prompts, with averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset, Subset

from diffusers_ext.golden_noise.losses import (
    ChangeFigures,
    change_figures,
    pair_inputs,
    relative_error,
    sequence_inputs,
)
from diffusers_ext.golden_noise.text_cache import NetworkText


logger = get_logger(__name__)

# (network, noise, golden states, text) -> figures by name
Measure = Callable[
    [torch.nn.Module, torch.Tensor, torch.Tensor, NetworkText], dict[str, ChangeFigures]
]


@contextmanager
def averaged_weights(network: torch.nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """The network in eval mode with the averaged weights; weights and modes come back to the bit."""
    training = [module for module in network.modules() if module.training]
    parameters = list(network.parameters())
    kept = [parameter.detach().clone() for parameter in parameters] if ema is not None else []
    try:
        network.eval()
        if ema is not None:
            ema.copy_to(parameters)
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(parameters, kept):
                parameter.copy_(old)
        for module in training:
            module.training = True


def measure_pairs(masked: bool) -> Measure:
    """Figures of a network of pairs, under the empty name."""

    def measure(
        network: torch.nn.Module, noise: torch.Tensor, golden: torch.Tensor, text: NetworkText
    ) -> dict[str, ChangeFigures]:
        prediction = network(noise, **pair_inputs(text, masked)).float()
        return {"": change_figures(prediction, golden[:, -1], noise)}

    return measure


def measure_sequences(pooled: bool) -> Measure:
    """Figures of a sequence network at its first and last step, from true states and by roll-out.

    From true states the change is that of one step; by roll-out it is the whole way from the first
    noise, so that errors which add up are seen.
    """

    def measure(
        network: torch.nn.Module, noise: torch.Tensor, golden: torch.Tensor, text: NetworkText
    ) -> dict[str, ChangeFigures]:
        states = torch.cat([noise[:, None], golden[:, :-1]], 1)
        inputs = sequence_inputs(text, pooled)
        forced = network(states, **inputs).mean.float()
        embeds, mask = inputs["text_embed"], inputs.get("attention_mask")
        rolled = network.generate_sequence(noise, embeds, golden.shape[1], attention_mask=mask)
        figures = {}
        for name, step in (("first", 0), ("last", -1)):
            figures[f"_{name}"] = change_figures(forced[:, step], golden[:, step], states[:, step])
            figures[f"_rollout_{name}"] = change_figures(
                rolled[:, step].float(), golden[:, step], noise
            )
        return figures

    return measure


class NoiseValidation:
    """Measures some samples of each split every `--validation_steps` and at the end.

    Args:
        accelerator: of the run; the main process measures.
        network: not yet prepared; its parameters are those that train.
        ema: averaged weights, which are then measured in place of the network's own.
        splits: samples by name of the split; the figures are called `<split>_relative` and so on.
        take_text: `(rows, device) -> NetworkText`.
        measure: of one batch.
        batch_size: samples measured at once.
        most: samples of a split that are measured, the first ones.

    Attributes:
        history: figures of all calls, one dictionary a step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        network: torch.nn.Module,
        ema: EMAModel | None,
        splits: dict[str, Dataset],
        take_text: Callable[[torch.Tensor, torch.device], NetworkText],
        measure: Measure,
        *,
        batch_size: int,
        most: int,
    ) -> None:
        self.accelerator, self.network, self.ema = accelerator, network, ema
        self.take_text, self.measure = take_text, measure
        self.batch_size = batch_size
        self.splits = {
            name: Subset(samples, range(min(most, len(samples))))
            for name, samples in splits.items()
            if len(samples)
        }
        self.history: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.history = state["history"]

    def run(self, step: int) -> None:
        """Measure all splits after a step; what `TrainingLoop` calls."""
        if not self.accelerator.is_main_process:
            return
        network = self.accelerator.unwrap_model(self.network)
        figures: dict[str, float] = {}
        with averaged_weights(network, self.ema):
            for split, samples in self.splits.items():
                figures.update(self._measure_split(network, split, samples))
        self.history = [entry for entry in self.history if entry["step"] < step]
        self.history.append({"step": step, **figures})
        logger.info(f"Step {step}: {figures}")
        for tracker in self.accelerator.trackers:
            tracker.log(figures, step=step)

    @torch.no_grad()
    def _measure_split(
        self, network: torch.nn.Module, split: str, samples: Dataset
    ) -> dict[str, float]:
        found: dict[str, list[ChangeFigures]] = {}
        # Without a generator of its own it would draw from the global one, which training uses.
        loader = DataLoader(samples, self.batch_size, generator=torch.Generator())
        device = self.accelerator.device
        for batch in loader:
            text = self.take_text(batch["text"], device)
            noise, golden = batch["noise"].to(device), batch["golden"].to(device)
            for name, figures in self.measure(network, noise, golden, text).items():
                found.setdefault(name, []).append(figures)
        return _summary(split, found)


def _summary(split: str, found: dict[str, Sequence[ChangeFigures]]) -> dict[str, float]:
    """`{split}_relative{name}` and `{split}_cosine{name}` of all batches together."""
    summary = {}
    for name, parts in found.items():
        figures = ChangeFigures(*(torch.cat(column) for column in zip(*parts)))
        summary[f"{split}_relative{name}"] = relative_error(figures).item()
        summary[f"{split}_cosine{name}"] = figures.cosine.mean().item()
    return summary
