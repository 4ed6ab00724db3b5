"""What the training of a golden-noise network does again and again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.utils._python_dispatch import _disable_current_modes

from diffusers_ext.golden_noise.losses import PairLoss, SequenceLoss
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from diffusers_ext.golden_noise.networks.npnet import NPNet
from diffusers_ext.golden_noise.networks.sequence_rnn import NoiseSequenceRNN
from diffusers_ext.golden_noise.networks.sequence_transformer import NoiseSequenceTransformer
from diffusers_ext.golden_noise.pairs.dataset import source_noise
from diffusers_ext.golden_noise.text_cache import CACHE_DTYPES, NetworkText, TextCache
from diffusers_ext.planning.golden_noise_setting import SEQUENCE_NETWORKS, GoldenNoiseSetting
from diffusers_ext.planning.image_shapes import ImageShapes
from diffusers_ext.planning.nullspace_works import OPTIMIZER
from diffusers_ext.planning.work import Precision, Work, inference_work, training_works


_CLASSES: dict[str, type[torch.nn.Module]] = {
    "golden_noise_model": GoldenNoiseModel,
    "npnet": NPNet,
    "transformer": NoiseSequenceTransformer,
    "rnn": NoiseSequenceRNN,
}
_KL_WEIGHT = 0.01


def network_of(shapes: ImageShapes, setting: GoldenNoiseSetting) -> torch.nn.Module:
    """The network on the meta device, in float32 as it trains.

    Raises:
        ValueError: a structure that the network cannot have.
    """
    channels, height, width = shapes.latents
    config = {"in_channels": channels, "text_embed_dim": shapes.text.width}
    config["sample_size"] = max(height, width)
    if setting.network == "npnet":
        config["text_length"] = shapes.text.tokens
    if setting.network in SEQUENCE_NETWORKS:
        config["num_steps"] = setting.num_steps
    with torch.device("meta"):
        network = _CLASSES[setting.network](**{**config, **setting.structure})
    if setting.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network.train()


def kept_name(setting: GoldenNoiseSetting) -> str:
    """What stays from step to step besides the network."""
    return f"{OPTIMIZER} and averaged weights" if setting.use_ema else OPTIMIZER


def network_works(
    shapes: ImageShapes, setting: GoldenNoiseSetting, precision: Precision
) -> list[Work]:
    """The training's own step over pairs or sequences without content."""
    rows = setting.train_batch_size

    def begin(network: torch.nn.Module, device: torch.device) -> Callable[[], torch.Tensor]:
        cache = _one_prompt(shapes, setting)
        step = _loss_of(setting, cache, device)
        return lambda: step(network, _batch(shapes, setting, rows, device), None)["loss"]

    work = Work(
        "network's activations and gradients",
        setting.max_train_steps,
        partial(network_of, shapes, setting),
        kept_name(setting),
    )
    batches = setting.gradient_accumulation_steps
    return training_works(work, batches, precision, begin, weight_decay=1e-2, ema=setting.use_ema)


def validation_work(
    shapes: ImageShapes, setting: GoldenNoiseSetting, rows: int, times: float
) -> Work:
    """A batch of pairs is measured."""

    def begin(network: torch.nn.Module, device: torch.device) -> Callable[[], object]:
        cache = _one_prompt(shapes, setting)
        step = _loss_of(setting, cache, device)

        def repeat() -> None:
            batch = _batch(shapes, setting, rows, device)
            step(network, batch, None)
            if setting.network in SEQUENCE_NETWORKS:
                text = cache.take(batch["text"], device)
                network.generate_sequence(
                    batch["noise"],
                    text.prompt_embeds,
                    setting.num_steps,
                    attention_mask=text.attention_mask,
                )

        return repeat

    return inference_work("validation", times, lambda: network_of(shapes, setting).eval(), begin)


def _loss_of(
    setting: GoldenNoiseSetting, cache: TextCache, device: torch.device
) -> PairLoss | SequenceLoss:
    """The loss as the training script has it for the network."""
    if setting.network in SEQUENCE_NETWORKS:
        weight = _KL_WEIGHT if setting.network == "rnn" else 0.0
        return SequenceLoss(cache, device, kl_weight=weight)
    return PairLoss(cache, device, masked=setting.network != "npnet")


def _one_prompt(shapes: ImageShapes, setting: GoldenNoiseSetting) -> TextCache:
    """The text of one prompt, which is in the host's memory and with data."""
    with _disable_current_modes():
        text = shapes.conditioning(1, torch.device("cpu"), CACHE_DTYPES[setting.text_cache_dtype])
    return TextCache([""], NetworkText(text.prompt_embeds, text.attention_mask, None))


def _batch(
    shapes: ImageShapes, setting: GoldenNoiseSetting, rows: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Noises from their seeds, golden noises without content, and rows of the text."""
    return {
        "noise": torch.stack([source_noise(seed, shapes.latents) for seed in range(rows)]).to(
            device
        ),
        "golden": torch.zeros(rows, setting.num_steps, *shapes.latents, device=device),
        "text": torch.zeros(rows, dtype=torch.long),
    }
