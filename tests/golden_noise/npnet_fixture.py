"""The reference set of NPNet: weights by rule, inputs by seed, outputs of the official code."""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffusers_ext.golden_noise.networks.npnet import NPNet

FOLDER = Path(__file__).parents[1] / "fixtures" / "npnet"
TEXT_WIDTH = {"sdxl": 2048, "dit": 1024}
SMALL_CONFIG = {
    "sample_size": 8,
    "text_embed_dim": 128,
    "text_length": 16,
    "svd_hidden_dim": 16,
    "svd_output_dim": 64,
    "svd_num_heads": 2,
    "swin_image_size": 32,
    "swin_patch_size": 2,
    "swin_embed_dim": 24,
    "swin_depths": (2, 2),
    "swin_num_heads": (2, 4),
    "swin_window_size": 4,
}


def filled(name: str, rule: dict) -> torch.Tensor:
    """One tensor by the rule of the reference set."""
    normal = torch.randn(rule["shape"], generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if rule["rule"] == "constant":
        return torch.full(rule["shape"], rule["value"])
    if rule["rule"] == "zero":
        return torch.zeros(rule["shape"], dtype=torch.int64)
    scaled = normal * rule["scale"]
    return {"randn": scaled, "randn_plus_1": scaled + 1, "abs_randn_plus_1": scaled.abs() + 1}[rule["rule"]]


def rules(name: str) -> dict[str, dict]:
    return json.loads((FOLDER / f"{name}_keys.json").read_text())["keys"]


@cache
def official_weights(name: str) -> dict[str, torch.Tensor]:
    """`sdxl`, `dit` or `svd_sensitive`, flat; not to be changed in place."""
    return {key: filled(key, rule) for key, rule in rules(name).items()}


def nested(weights: dict[str, torch.Tensor]) -> dict:
    """The official form: one state dict per part."""
    tree: dict = {}
    for name, value in weights.items():
        top, _, rest = name.partition(".")
        if rest:
            tree.setdefault(top, {})[rest] = value
        else:
            tree[top] = value
    return tree


def inputs(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and prompt embeddings of two samples."""
    noise = torch.randn(2, 4, 128, 128, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 77, TEXT_WIDTH[name], generator=torch.Generator().manual_seed(1))
    return noise, text * 0.5


def outputs(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def small_npnet(seed: int = 0, **options: object) -> NPNet:
    """A small network with no parameter at zero, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = NPNet(**{**SMALL_CONFIG, **options})
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        network.alpha.data.fill_(0.3)
        network.beta.data.fill_(0.2)
    return network.eval()


def small_inputs(batch: int = 2, size: tuple[int, int] = (8, 8)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(batch, 4, *size, generator=generator), torch.randn(batch, 16, 128, generator=generator))
