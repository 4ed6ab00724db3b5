"""Load a golden-noise network of whichever class its folder names."""

from __future__ import annotations

import importlib
import os
from typing import Any

from diffusers_ext.golden_noise.hub_sources import read_network_config
from diffusers_ext.golden_noise.network import GoldenNoiseNetwork


# Only the module of the class that is asked for is imported.
NETWORK_MODULES = {
    "NPNet": "diffusers_ext.golden_noise.npnet",
    "GoldenNoiseModel": "diffusers_ext.golden_noise.model",
    "NoiseSequenceTransformer": "diffusers_ext.golden_noise.sequence_transformer",
    "NoiseSequenceRNN": "diffusers_ext.golden_noise.sequence_rnn",
}


def load_noise_model(
    pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
) -> GoldenNoiseNetwork:
    """A golden-noise network from a folder or from the Hub, of the class its `config.json` names.

    Args:
        pretrained_model_name_or_path: a local folder, or `"user/name"`.
        kwargs: of `ModelMixin.from_pretrained`: `subfolder`, `revision`, `dtype`, ...

    Returns:
        The network in eval mode.

    Raises:
        ValueError: nothing of that name, or it holds something else.
    """
    source = str(pretrained_model_name_or_path)
    name = read_network_config(source, kwargs).get("_class_name")
    if name not in NETWORK_MODULES:
        raise ValueError(
            "`pretrained_model_name_or_path` must hold a golden-noise network, one of "
            f"{list(NETWORK_MODULES)}, got {name!r} in {source}. A `.pth` or safetensors file of "
            "the official code is read by `NPNet.from_single_file`."
        )
    network_class = getattr(importlib.import_module(NETWORK_MODULES[name]), name)
    return network_class.from_pretrained(source, **kwargs)
