"""What a training of a golden-noise network leaves: the network, a report, and a repository on the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffusers_ext.golden_noise.card import network_card
from diffusers_ext.golden_noise.settings import NoiseSettings
from diffusers_ext.hub import Measured
from diffusers_ext.hub.card import Card
from diffusers_ext.hub.licence import public_name
from diffusers_ext.training.run.script import ON_THE_WAY, staged_output
from diffusers_ext.training.run.upload import (
    card_arguments,
    left_here,
    push_output,
    reported_arguments,
)


_TRAINING_SETTINGS = (
    "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler", "adam_weight_decay", "use_ema", "ema_decay", "mixed_precision", "seed",
    "remove_prompt_mean",
)  # fmt: skip
_NOISE_SETTINGS = ("redenoise_steps", "w1", "w2", "guidance_scale", "num_inference_steps")
_METRICS = {"relative": "relative squared error", "cosine": "cosine with the true change"}
# Figures of sequence networks, by the end of their names.
_STATES = {
    "": None,
    "first": "of the first step",
    "last": "of the last step",
    "rollout_first": "of the first step, rolled out",
    "rollout_last": "of the last step, rolled out",
}


def network_report(
    settings: NoiseSettings, network: torch.nn.Module, **facts: Any
) -> dict[str, Any]:
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
        text = json.dumps(report, indent=2) + "\n"
        (folder / "training_report.json").write_text(text, encoding="utf-8")


def trained_network_card(
    settings: NoiseSettings,
    network: torch.nn.Module,
    *,
    data: Mapping[str, Any],
    pipeline_class: str,
    validation: Sequence[Mapping[str, float]],
) -> Callable[..., Card]:
    """The card of a trained network but for the name of its repository.

    Args:
        settings: of the training script.
        network: that trains or was trained.
        data: facts of the noises, as in the report.
        pipeline_class: of the base model.
        validation: figures by step; empty before the training.

    Raises:
        ValueError: a fact is not known, such as the licence.
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


def figures_measured(
    settings: NoiseSettings, data: Mapping[str, Any], figures: Mapping[str, float]
) -> list[Measured]:
    """The figures of one validation on prompts that were not trained on.

    Args:
        settings: of the training script.
        data: facts of the noises.
        figures: `validation_<metric>[_<state>]` and others, which are passed over.
    """
    count = min(settings.num_validation_pairs, data["validation_samples"])
    results = []
    for name, value in figures.items():
        split, _, rest = name.partition("_")
        kind, _, state = rest.partition("_")
        if split == "validation" and kind in _METRICS:
            which = f"{_METRICS[kind]} {_STATES[state]}" if state else _METRICS[kind]
            good = "0 is perfect, 1 is the noise as it is" if kind == "relative" else "1 is perfect"
            notes = f"{good}; {count} noises"
            results.append(
                Measured(f"held-out prompts of {_set_name(settings)}", which, value, notes=notes)
            )
    return results


def publish_network(
    settings: NoiseSettings, network: torch.nn.Module, report: Mapping[str, Any]
) -> str:
    """Upload the output folder (network, report, card), without checkpoints, logs and data.

    Returns:
        Address of the commit.
    """
    card = trained_network_card(
        settings,
        network,
        data=report["data"],
        pipeline_class=report["pipeline_class"],
        validation=report["validation"],
    )
    return push_output(
        settings, card, left_here(settings, settings.dataset_dir, settings.text_cache_dir)
    )


def _set_name(settings: NoiseSettings) -> str:
    return public_name(settings.dataset_dir)


def _origin(settings: NoiseSettings, data: Mapping[str, Any]) -> str:
    """The noises in words."""
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
