"""Load a golden-noise network of whichever class its folder names."""

from __future__ import annotations

import importlib
import os
from typing import Any

from diffusers import ConfigMixin

from diffusers_ext.golden_noise.network import GoldenNoiseNetwork


# Only the module of the class that is asked for is imported.
NETWORK_MODULES = {
    "NPNet": "diffusers_ext.golden_noise.npnet",
    "GoldenNoiseModel": "diffusers_ext.golden_noise.model",
    "NoiseSequenceTransformer": "diffusers_ext.golden_noise.sequence_transformer",
    "NoiseSequenceRNN": "diffusers_ext.golden_noise.sequence_rnn",
}
_WHERE = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")


class _AnyConfig(ConfigMixin):
    config_name = "config.json"


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
        ValueError: the folder holds something else.
        OSError: there is no `config.json`.
    """
    source = str(pretrained_model_name_or_path)
    where = {name: kwargs[name] for name in _WHERE if name in kwargs}
    name = _AnyConfig.load_config(source, **where).get("_class_name")
    if name not in NETWORK_MODULES:
        raise ValueError(
            "`pretrained_model_name_or_path` must hold a golden-noise network, one of "
            f"{list(NETWORK_MODULES)}, got {name!r} in {source}. A `.pth` or safetensors file of "
            "the official code is read by `NPNet.from_single_file`."
        )
    network_class = getattr(importlib.import_module(NETWORK_MODULES[name]), name)
    return network_class.from_pretrained(source, **kwargs)
