"""What a training of a golden-noise network is measured by, and what it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset, Subset

from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.card import network_card
from diffusers_ext.golden_noise.losses import (
    ChangeFigures,
    change_figures,
    pair_inputs,
    relative_error,
    sequence_inputs,
)
from diffusers_ext.hub import Measured
from diffusers_ext.hub.card import Card
from diffusers_ext.hub.kinds import public_name
from diffusers_ext.training.golden_noise.settings import NoiseSettings
from diffusers_ext.training.run.script import (
    ON_THE_WAY,
    card_arguments,
    left_here,
    push_output,
    reported_arguments,
    staged_output,
)

logger = get_logger(__name__)

# (network, noise, golden states, text) -> figures by name
Measure = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, TextConditioning], dict[str, ChangeFigures]]


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


def measure_pairs(
    network: torch.nn.Module, noise: torch.Tensor, golden: torch.Tensor, text: TextConditioning, *, masked: bool
) -> dict[str, ChangeFigures]:
    """Figures of a network of pairs, under the empty name."""
    prediction = network(noise, **pair_inputs(text, masked)).float()
    return {"": change_figures(prediction, golden[:, -1], noise)}


def measure_sequences(
    network: torch.nn.Module, noise: torch.Tensor, golden: torch.Tensor, text: TextConditioning, *, pooled: bool
) -> dict[str, ChangeFigures]:
    """Figures of a sequence network at its first and last step, from true states and by roll-out.

    From true states the change is that of one step; by roll-out it is the whole way from the first noise, so that
    errors which add up are seen.
    """
    states = torch.cat([noise[:, None], golden[:, :-1]], 1)
    inputs = sequence_inputs(text, pooled)
    forced = network(states, **inputs).mean.float()
    embeds, mask = inputs["text_embed"], inputs.get("attention_mask")
    rolled = network.generate_sequence(noise, embeds, golden.shape[1], attention_mask=mask)
    figures = {}
    for name, step in (("first", 0), ("last", -1)):
        figures[f"_{name}"] = change_figures(forced[:, step], golden[:, step], states[:, step])
        figures[f"_rollout_{name}"] = change_figures(rolled[:, step].float(), golden[:, step], noise)
    return figures


class NoiseValidation:
    """Measures the first `most` samples of each split every `--validation_steps` and at the end.

    The figures are called `<split>_relative` and so on; `history` has those of all calls, one dictionary a step. With
    `ema` the averaged weights are measured in place of the network's own. The main process measures.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        network: torch.nn.Module,
        ema: EMAModel | None,
        splits: dict[str, Dataset],
        take_text: Callable[[torch.Tensor, torch.device], TextConditioning],
        measure: Measure,
        *,
        batch_size: int,
        most: int,
    ) -> None:
        self.accelerator, self.network, self.ema = accelerator, network, ema
        self.take_text, self.measure = take_text, measure
        self.batch_size = batch_size
        self.splits = {
            name: Subset(samples, range(min(most, len(samples)))) for name, samples in splits.items() if len(samples)
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
    def _measure_split(self, network: torch.nn.Module, split: str, samples: Dataset) -> dict[str, float]:
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


_TRAINING_SETTINGS = (
    "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler", "adam_weight_decay", "use_ema", "ema_decay", "mixed_precision", "seed",
    "remove_prompt_mean",
)  # fmt: skip
_NOISE_SETTINGS = ("redenoise_steps", "w1", "w2", "guidance_scale", "num_inference_steps")
# Figures of a validation: what they are, and what is good.
_METRICS = {
    "relative": ("relative squared error", "0 is perfect, 1 is the noise as it is"),
    "cosine": ("cosine with the true change", "1 is perfect"),
    "gain": ("gain of the reward", "0 is the noise as it is"),
    "wins": ("share of noises whose reward rises", "the noise as it is has 0"),
}
# Figures of sequence networks, by the end of their names.
_STATES = {
    "": None,
    "first": "of the first step",
    "last": "of the last step",
    "rollout_first": "of the first step, rolled out",
    "rollout_last": "of the last step, rolled out",
}


def network_report(settings: NoiseSettings, network: torch.nn.Module, **facts: Any) -> dict[str, Any]:
    """Everything about a training as JSON, the token left out."""
    return {
        "arguments": reported_arguments(settings),
        "network": type(network).__name__,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "trained_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        **facts,
    }


def save_network(settings: NoiseSettings, network: torch.nn.Module, report: dict[str, Any]) -> None:
    """Write the network and the report, all at once."""
    with staged_output(settings.output_dir, ("config.json",), ON_THE_WAY) as folder:
        network.save_pretrained(folder)
        (folder / "training_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def trained_network_card(
    settings: NoiseSettings,
    network: torch.nn.Module,
    *,
    data: Mapping[str, Any],
    pipeline_class: str,
    validation: Sequence[Mapping[str, float]],
) -> Callable[..., Card]:
    """The card but for the name of its repository; raises `ValueError` where a fact, as the licence, is not known.

    `data` are facts of the noises, as in the report; `validation` figures by step, none before the training.
    """
    made = data["generation"] or {}
    shown = {name: getattr(settings, name) for name in _TRAINING_SETTINGS}
    if not settings.use_ema:
        del shown["use_ema"], shown["ema_decay"]
    shown |= {f"noises: {name}": made[name] for name in _NOISE_SETTINGS if name in made}
    return network_card(
        network,
        trained_on=_origin(settings, data),
        pipeline=pipeline_class,
        results=figures_measured(settings, data, validation[-1]) if validation else (),
        settings=shown,
        latent_shape=data["latent_shape"],
        **card_arguments(settings),
    )


def figures_measured(settings: NoiseSettings, data: Mapping[str, Any], figures: Mapping[str, float]) -> list[Measured]:
    """Of one validation's figures those on prompts that were not trained on, `validation_<metric>[_<state>]`."""
    count = min(settings.num_validation_pairs, data["validation_samples"])
    results = []
    for name, value in figures.items():
        split, _, rest = name.partition("_")
        kind, _, state = rest.partition("_")
        if split == "validation" and kind in _METRICS:
            what, good = _METRICS[kind]
            which = f"{what} {_STATES[state]}" if state else what
            notes = f"{good}; {count} noises"
            results.append(Measured(f"held-out prompts of {_set_name(settings)}", which, value, notes=notes))
    return results


def publish_network(settings: NoiseSettings, network: torch.nn.Module, report: Mapping[str, Any]) -> str:
    """Upload the output folder without checkpoints, logs and data; returns the address of the commit."""
    facts = {name: report[name] for name in ("data", "pipeline_class", "validation")}
    card = trained_network_card(settings, network, **facts)
    return push_output(settings, card, left_here(settings, settings.dataset_dir, settings.text_cache_dir))


def _set_name(settings: NoiseSettings) -> str:
    return public_name(settings.prompt_file if _by_reward(settings) else settings.dataset_dir)


def _by_reward(settings: NoiseSettings) -> bool:
    return getattr(settings, "objective", "pairs") == "reward"


def _origin(settings: NoiseSettings, data: Mapping[str, Any]) -> str:
    """The noises in words."""
    if _by_reward(settings):
        judge = " ".join(str(value) for value in data["generation"]["reward"].values() if value)
        return (
            f"The prompts of {_set_name(settings)}, by the gradient of {judge} through the denoising steps. "
            f"{data['validation_samples']} noises more were held out by their prompts."
        )
    steps = data["steps"]
    what = f"sequences of {len(steps)} golden noises" if len(steps) > 1 else "noise pairs"
    words = [f"{data['training_samples']} {what} of {_set_name(settings)}"]
    if len(steps) == 1 and steps != [1]:
        words.append(f"towards step {steps[0]} of their sequences")
    reward = (data["generation"] or {}).get("reward")
    if reward:
        words.append(f"chosen by {' '.join(str(v) for v in reward.values() if v)}")
    if data.get("removed_prompt_mean"):
        words.append(
            f"with a share of {data['removed_prompt_mean']} of each prompt's mean change taken out, "
            "which keeps pictures of one prompt diverse"
        )
    return ", ".join(words) + f". {data['validation_samples']} more were held out by their prompts."
