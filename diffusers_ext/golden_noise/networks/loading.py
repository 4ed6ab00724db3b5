"""Load a golden-noise network of whichever class its folder names."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from diffusers_ext.core.sources import refuse_checkpoint
from diffusers_ext.core.tensor_files import check_regular_file
from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork
from diffusers_ext.golden_noise.networks.files import read_network_config


# Only the module of the class that is asked for is imported.
NETWORK_MODULES = {
    "NPNet": "diffusers_ext.golden_noise.networks.npnet",
    "GoldenNoiseModel": "diffusers_ext.golden_noise.networks.golden_noise_model",
    "NoiseSequenceTransformer": "diffusers_ext.golden_noise.networks.sequence_transformer",
    "NoiseSequenceRNN": "diffusers_ext.golden_noise.networks.sequence_rnn",
}


_FILE_ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def load_noise_model(
    pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
) -> GoldenNoiseNetwork:
    """A golden-noise network from a folder or from the Hub, of the class its `config.json` names.

    Args:
        pretrained_model_name_or_path: a local folder, `"user/name"`, or a single file with the
            published NPNet weights: the official `.pth`, or safetensors with the same keys.
        kwargs: of `ModelMixin.from_pretrained`: `subfolder`, `revision`, `dtype`, ...; for a single
            file those of `NPNet.from_single_file`.

    Returns:
        The network in eval mode.

    Raises:
        ValueError: nothing of that name, it holds something else, or weights that are damaged.
        TypeError: another keyword.
    """
    source = str(pretrained_model_name_or_path)
    refuse_checkpoint(Path(source, kwargs.get("subfolder") or ""))
    if not Path(source).is_dir() and (Path(source).is_file() or source.endswith(_FILE_ENDINGS)):
        return _load_single_file(Path(source), kwargs)
    name = read_network_config(source, kwargs).get("_class_name")
    if not isinstance(name, str) or name not in NETWORK_MODULES:
        raise ValueError(
            "`pretrained_model_name_or_path` must hold a golden-noise network, one of "
            f"{list(NETWORK_MODULES)}, got {name!r} in {source}. A `.pth` or safetensors file of "
            "the official code is read by `NPNet.from_single_file`."
        )
    network_class = getattr(importlib.import_module(NETWORK_MODULES[name]), name)
    return network_class.from_pretrained(source, **kwargs)


def _load_single_file(path: Path, arguments: dict[str, Any]) -> GoldenNoiseNetwork:
    # Not imported above: only the module of the class that is asked for is.
    npnet = importlib.import_module(NETWORK_MODULES["NPNet"]).NPNet
    for name in arguments:
        if name not in ("variant", "dtype"):
            raise TypeError(
                f"load_noise_model() got an unexpected keyword argument {name!r}: of a single file it "
                "takes `variant` and `dtype`."
            )
    check_regular_file(path, "Give a network's folder, its Hub name, or a file of NPNet's weights.")
    if path.name.startswith("diffusion_pytorch_model") and path.with_name("config.json").is_file():
        raise ValueError(
            f"`pretrained_model_name_or_path` must be the folder of a saved network, got its file "
            f"{path}. Give {path.parent}."
        )
    return npnet.from_single_file(path, **arguments)
