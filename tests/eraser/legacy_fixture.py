"""The reference set of legacy erasers: weights by rule, inputs by seed, outputs of the official code."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

from tests.filled_weights import fill

FOLDER = Path(__file__).parents[1] / "fixtures" / "legacy_eraser"


def rules() -> dict:
    return json.loads((FOLDER / "keys.json").read_text())


def reference_transformer(rotary: bool = False) -> CogVideoXTransformer3DModel:
    """The transformer of the reference set, without erasers."""
    config = rules()["config"] | {"use_rotary_positional_embeddings": rotary}
    transformer = CogVideoXTransformer3DModel(**config).eval()
    transformer.load_state_dict(fill(rules()["keys"]))
    return transformer


def outputs() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "outputs.safetensors")


@torch.no_grad()
def run_reference(transformer: CogVideoXTransformer3DModel, rotary: bool = False) -> torch.Tensor:
    """Output `(2, 3, 4, 8, 8)` on the inputs of the reference set."""
    tables = outputs()
    return transformer(
        hidden_states=torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        encoder_hidden_states=torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1)),
        timestep=torch.tensor([999, 250]),
        image_rotary_emb=(tables["rotary.cos"], tables["rotary.sin"]) if rotary else None,
        return_dict=False,
    )[0]
