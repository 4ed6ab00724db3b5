"""The cards of golden-noise networks, pipelines and sets of pairs, from themselves and where they came from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.core.text_files import read_json
from diffusers_ext.families import FAMILIES
from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.hub.kinds import find_on_hub, public_name

# The pipeline of this package that takes the network for a base pipeline.
GOLDEN_PIPELINES = {f.pipelines[0]: f.golden_pipeline for f in FAMILIES if f.golden_pipeline}
_KINDS = {
    "NPNet": "npnet",
    "GoldenNoiseModel": "golden_noise_model",
    "NoiseSequenceTransformer": "noise_sequence_transformer",
    "NoiseSequenceRNN": "noise_sequence_rnn",
}
_INDEX = "model_index.json"
# Of how a set of pairs was made, for its card.
_OF_TARGET = {
    "guidance": ("redenoise_steps", "w1", "w2", "legacy_inversion"),
    "reward": ("target", "ascent_steps", "ascent_rate", "gradient_steps"),
    "best_of_n": ("target", "best_of", "spread"),
    "diversity": ("target", "ascent_steps", "ascent_rate", "diversity_gain"),
}
_PAIR_SETTINGS = (
    "negative_prompt", "num_inference_steps", "guidance_scale", "margin", "noises_per_prompt", "seed",
    "mixed_precision",
)  # fmt: skip


def network_card(
    network: torch.nn.Module,
    *,
    base_model: str | os.PathLike | None = None,
    pipeline: str | type | None = None,
    latent_shape: Sequence[int] | None = None,
    token: str | None = None,
    **common: Any,
) -> Callable[..., Card]:
    """The card of a network but for the name of its repository; `ValueError` for a fact that is not known.

    Args:
        base_model: Hub name, folder or label of the model whose noise it refines.
        pipeline: class of the golden pipeline that takes it; read from the base model when `None`.
        latent_shape: `(channels, height, width)` trained at; as its config says when `None`.
        common: further facts of every card, as of `make_card`.
    """
    name, config = type(network).__name__, network.config
    if name not in _KINDS:
        raise ValueError(
            f"`network` must be one of {list(_KINDS)} to get a card, got a {name}. Save it by "
            "`save_pretrained` and upload the folder with a card of your own."
        )
    if base_model is None:
        raise ValueError(
            "`base_model` must be given for the card, got None. Pass the Hub name of the model "
            "whose noise the network refines."
        )
    if latent_shape is None:
        latent_shape = (config.in_channels, config.sample_size, config.sample_size)
    return make_card(
        _KINDS[name],
        base_model=base_model,
        token=token,
        network=name,
        pipeline=golden_pipeline_name(base_model, pipeline, token=token),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        latent_shape=tuple(latent_shape),
        any_size=name != "NPNet",
        text_embed_dim=config.text_embed_dim,
        **common,
    )


def golden_pipeline_name(
    base_model: str | os.PathLike, pipeline: str | type | None, *, token: str | None = None
) -> str:
    """The golden class for a plain or golden one, or for a base model, whose `model_index.json` is read."""
    name = pipeline.__name__ if isinstance(pipeline, type) else pipeline
    if name is None:
        name = read_pipeline_class(base_model, token)
    known = {**GOLDEN_PIPELINES, **{golden: golden for golden in GOLDEN_PIPELINES.values()}}
    if name not in known:
        found = f"got {name!r}" if name else f"got None, and {base_model} has no {_INDEX}"
        raise ValueError(
            f"`pipeline` must be one of {sorted(GOLDEN_PIPELINES.values())}, {found}. Pass the one "
            "that takes the network."
        )
    return known[name]


def read_pipeline_class(base_model: str | os.PathLike, token: str | None) -> str | None:
    """The class in the `model_index.json` of a folder or repository; `None` where there is none."""
    path = Path(base_model, _INDEX)
    if not Path(base_model).is_dir():
        path = find_on_hub(str(base_model), _INDEX, token)
    return read_json(path).get("_class_name") if path is not None and path.is_file() else None


def pipeline_card(
    pipeline: DiffusionPipeline,
    *,
    base_model: str | os.PathLike | None = None,
    trained_on: str | None = None,
    token: str | None = None,
    **common: Any,
) -> Callable[..., Card]:
    """The card of a pipeline but for the name of its repository; `ValueError` where a LoRA is loaded.

    Args:
        base_model: Hub name, folder or label of the plain model; where the pipeline was loaded from when `None`, if
            that was a plain model on the Hub.
        trained_on: the noises its network was trained on; needless without a network.
        common: further facts of every card, as of `make_card`.
    """
    name, plain = _family(pipeline)
    adapted = [key for key, part in pipeline.components.items() if getattr(part, "peft_config", 0)]
    if adapted:
        raise ValueError(
            f"A pipeline to upload must have no LoRA loaded, got one in {adapted}: its files would "
            "not load. Upload the LoRA by itself, or fuse it and `unload_lora_weights()` first."
        )
    network = pipeline.noise_model
    if base_model is None:
        base_model = _plain_origin(pipeline, token)
    if network is None and trained_on is None:
        trained_on = f"Nothing: these are the weights of {public_name(base_model)}."
    return make_card(
        "golden_noise_pipeline",
        base_model=base_model,
        trained_on=trained_on,
        token=token,
        pipeline=name,
        plain_pipeline=plain,
        # Not `None`, which stands for what is not known.
        network="" if network is None else type(network).__name__,
        parameters=0 if network is None else sum(p.numel() for p in network.parameters()),
        **common,
    )


def _family(pipeline: DiffusionPipeline) -> tuple[str, str]:
    names = [parent.__name__ for parent in type(pipeline).__mro__]
    for plain, golden in GOLDEN_PIPELINES.items():
        if golden in names:
            return golden, plain
    raise ValueError(f"`pipeline` must be one of {sorted(GOLDEN_PIPELINES.values())}, got a {names[0]}.")


def _plain_origin(pipeline: DiffusionPipeline, token: str | None) -> str:
    """Where the pipeline was loaded from; not from a golden one, which has a base of its own."""
    name = pipeline.name_or_path
    if name and not Path(name).exists() and read_pipeline_class(name, token) in GOLDEN_PIPELINES:
        return name
    raise ValueError(
        "`base_model` must be given for the card of a pipeline that was not loaded from a plain "
        "one on the Hub, got None. Pass the Hub name of the plain model."
    )


def pair_set_card(
    made: Mapping[str, Any] | None,
    *,
    base_model: str | os.PathLike | None = None,
    trained_on: str | None = None,
    pipeline: str | None = None,
    reward: str | None = None,
    settings: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Callable[..., Card]:
    """The card of a set but for the name of its repository.

    Args:
        made: the facts of `generate_npd.py`, which the other arguments go before.
        reward: name and version of what judged the pairs; the empty string for none.
        facts: as of `make_card`, and the counts and shape of the set.
    """
    made = made or {}
    base_model = base_model or made.get("pretrained_model_name_or_path")
    if base_model is None:
        raise ValueError(
            "`base_model` must be given for the card of a set that does not know how it was made, "
            "got None. Pass the Hub name of the model that its noises are for."
        )
    label = public_name(base_model)
    if reward is None and "reward" in made:
        judge = made["reward"] or {}
        reward = " ".join(str(judge[key]) for key in ("name", "version") if judge.get(key))
    if settings is None:
        of_target = _OF_TARGET[made.get("target", "guidance")]
        known = {name: made.get(name) for name in (*of_target, *_PAIR_SETTINGS)}
        settings = {name: value for name, value in known.items() if value not in (None, "")}
    return make_card(
        "pair_data_set",
        base_model=base_model,
        trained_on=_pairs_origin(made, label, reward) if trained_on is None else trained_on,
        settings=settings,
        pipeline=pipeline or made.get("pipeline"),
        reward=reward,
        **facts,
    )


def _pairs_origin(made: Mapping[str, Any], label: str, reward: str | None) -> str | None:
    """What a generated set was made from; `None` where that is not known."""
    names = ("prompts", "noises_per_prompt", "redenoise_steps", "w1", "w2")
    if reward is None or not all(name in made for name in names):
        return None
    prompts, noises = made["prompts"]["count"], made["noises_per_prompt"]
    drawn = "one random noise" if noises == 1 else f"{noises} random noises"
    kept = "All pairs were kept."
    if reward and not made.get("no_filter"):
        kept = (
            f"Pairs whose picture gained more than {made['margin']:g} by {reward} were kept, all "
            "others are among the rejected."
        )
    target = made.get("target", "guidance")
    if target == "reward":
        return (
            f"By gradient ascent of {reward} through {made['num_inference_steps']} denoising steps of {label}, "
            f"{made['ascent_steps']} times {made['ascent_rate']:g} of the noise's deviation, from {drawn} for each of "
            f"{prompts} prompts. {kept}"
        )
    if target == "best_of_n":
        return (
            f"The best by {reward} of {made['best_of']} noises at a distance of {made['spread']:g} around {drawn} for "
            f"each of {prompts} prompts, drawn with {label}. {kept}"
        )
    if target == "diversity":
        return (
            f"From {drawn} for each of {prompts} prompts, moved so that what {label} predicts in the first of "
            f"{made['num_inference_steps']} steps lies {made['diversity_gain']:g} times its distance further from the "
            f"prompt's mean: {made['ascent_steps']} steps of {made['ascent_rate']:g} of the noise's deviation. {kept}"
        )
    return (
        f"Re-denoised with {label} from {drawn} for each of {prompts} prompts: a step down with guidance "
        f"{made['w1']:g} and up with guidance {made['w2']:g}, of {made['redenoise_steps']} steps. {kept}"
    )
