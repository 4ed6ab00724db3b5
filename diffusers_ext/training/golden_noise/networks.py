"""Golden-noise networks from the command line: new ones, or saved ones to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from diffusers_ext.golden_noise.networks.loading import load_noise_model
from diffusers_ext.golden_noise.networks.npnet import NPNet
from diffusers_ext.golden_noise.networks.sequence_rnn import NoiseSequenceRNN
from diffusers_ext.golden_noise.networks.sequence_transformer import NoiseSequenceTransformer
from diffusers_ext.golden_noise.settings import NoiseSettings
from diffusers_ext.golden_noise.text_cache import TextCache


NETWORKS: dict[str, type[torch.nn.Module]] = {
    "npnet": NPNet,
    "golden_noise_model": GoldenNoiseModel,
    "transformer": NoiseSequenceTransformer,
    "rnn": NoiseSequenceRNN,
}
_WEIGHT_FILES = (".pth", ".pt", ".safetensors")


def data_config(
    settings: NoiseSettings, latent_shape: Sequence[int], cache: TextCache, num_steps: int
) -> dict[str, Any]:
    """The config fields that follow from latents, text and length of the sequences.

    Raises:
        ValueError: `--text_embed_dim` or `--npnet_model_id` say another width than the text has.
    """
    text = cache.facts
    pooled = getattr(settings, "pooled_text", None)
    width = text["pooled_dim"] if pooled else text["text_embed_dim"]
    if width is None:
        raise ValueError(
            "`pooled_text` must not be given for a base model without pooled embeddings, got "
            f"{settings.pretrained_model_name_or_path}."
        )
    wanted = {"SDXL": 2048, "DreamShaper": 2048, "DiT": 1024}.get(settings.npnet_model_id)
    if wanted is not None and wanted != text["text_embed_dim"]:
        raise ValueError(
            f"`npnet_model_id` must be of the base model's family, got {settings.npnet_model_id} with "
            f"text {wanted} wide for a base model with {text['text_embed_dim']}."
        )
    if settings.text_embed_dim not in (None, width):
        other = "" if text["pooled_dim"] is None else f", {text['pooled_dim']} pooled"
        raise ValueError(
            f"`text_embed_dim` must be the base model's {text['text_embed_dim']}{other}, got "
            f"{settings.text_embed_dim}. It can be left out."
        )
    config = {"in_channels": latent_shape[0], "text_embed_dim": width}
    if settings.model == "npnet":
        if latent_shape[1] != latent_shape[2]:
            raise ValueError(
                "`dataset_dir` must hold square noises for NPNet, got "
                f"{latent_shape[1]} x {latent_shape[2]}. Train a GoldenNoiseModel."
            )
        return {**config, "sample_size": latent_shape[1], "text_length": text["tokens"]}
    config["sample_size"] = max(latent_shape[1:])
    if settings.model == "rnn":
        config["pooled_text"] = bool(pooled)
    return (
        {**config, "num_steps": num_steps} if settings.model in ("transformer", "rnn") else config
    )


def make_network(
    settings: NoiseSettings, latent_shape: Sequence[int], cache: TextCache, num_steps: int
) -> torch.nn.Module:
    """The network that trains, in float32: new, or `--init_from`.

    Raises:
        ValueError: what the command line and the data ask for contradicts the saved network, or no
            network can be built so.
    """
    wanted = {**data_config(settings, latent_shape, cache, num_steps), **settings.structure()}
    if settings.init_from is None:
        torch.manual_seed(settings.seed)  # whatever has drawn numbers before
        return NETWORKS[settings.model](**wanted)
    network = _load(settings)
    for name, value in wanted.items():
        found = network.config[name]
        found = list(found) if isinstance(found, (list, tuple)) else found
        enough = name == "num_steps" and found >= value
        # A network that does not care about the size keeps the one it was made at.
        free = name == "sample_size" and settings.model != "npnet"
        if found != value and not enough and not free:
            raise ValueError(
                f"`init_from` must be a network with `{name}` = {value}, got {found} in "
                f"{settings.init_from}."
            )
    return network


def _load(settings: NoiseSettings) -> torch.nn.Module:
    wanted = NETWORKS[settings.model]
    if Path(settings.init_from).suffix in _WEIGHT_FILES:
        if settings.model != "npnet":
            raise ValueError(
                f"`init_from` must be a folder or Hub name for `--model {settings.model}`, got "
                f"{settings.init_from}: single files are NPNet's."
            )
        return NPNet.from_single_file(settings.init_from).float()
    network = load_noise_model(settings.init_from, dtype=torch.float32)
    if not isinstance(network, wanted):
        raise ValueError(
            f"`init_from` must be a {wanted.__name__} for `--model {settings.model}`, got a "
            f"{type(network).__name__} in {settings.init_from}."
        )
    return network
