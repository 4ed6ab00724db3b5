"""What tells one model from another is the same under all versions of transformers and diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffusers_ext.core.artifacts import fingerprint, same_fingerprint

ROOT = Path(__file__).parents[2]
# Of the bundled models, made with transformers 5.23.0 and diffusers 0.42.1.
STORED = json.loads((ROOT / "tests" / "fixtures" / "fingerprints.json").read_text(encoding="utf-8"))


class Part(nn.Module):
    """Holds one module under a name."""

    def __init__(self, name: str, part: nn.Module) -> None:
        super().__init__()
        self.add_module(name, part)


@pytest.mark.parametrize("name", ["digits", "digits_flux2", "moving_digits", "moving_digits_wan"])
def test_bundled_models_are_those_that_were_stored(name):
    pipeline = DiffusionPipeline.from_pretrained(ROOT / "examples" / name / "model")
    parts = {key: part for key, part in pipeline.components.items() if isinstance(part, nn.Module)}
    assert {"vae", "text_encoder"} < parts.keys() == STORED[name].keys()
    for key, part in parts.items():
        assert same_fingerprint(STORED[name][key], fingerprint(part, 16)), key


def test_what_wraps_an_encoder_does_not_count():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    plain = Part("embeddings", encoder)
    assert fingerprint(Part("text_model", plain)) == fingerprint(plain)
    tower, wrapped = Part("vision_tower", plain), Part("vision_tower", Part("vision_model", plain))
    assert fingerprint(tower) == fingerprint(wrapped)
    assert fingerprint(tower) != fingerprint(plain)
