"""Parameters of the published models' erasers, counted on the meta device."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel
from peft import inject_adapter_in_model

from diffusers_ext.eraser.adapter.config import EraserConfig, eraser_size, transformer_width
from diffusers_ext.families.cogvideox import PUBLISHED_TRANSFORMERS

# Parameters of the whole transformer, width, blocks.
KNOWN = {
    "CogVideoX-2b": (1_693_783_872, 1920, 30),
    "CogVideoX-5b": (5_570_283_072, 3072, 42),
    "CogVideoX-5b-I2V": (5_570_479_680, 3072, 42),
    "CogVideoX1.5-5B": (5_570_676_352, 3072, 42),
    "CogVideoX1.5-5B-I2V": (5_571_594_880, 3072, 42),
}
# Leaves the parameters alone; tables of positions are buffers and slow to make.
SHORT = {"sample_frames": 9, "sample_height": 8, "sample_width": 8}
# Millions of parameters by rank.
SIZES = {
    1920: {16: 1.90, 32: 3.74, 64: 7.43, 128: 14.807040, 256: 29.6},
    3072: {16: 4.26, 32: 8.39, 64: 16.65, 128: 33.164544, 256: 66.2},
}


def parameters(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", KNOWN)
def test_an_eraser_on_a_published_model_has_the_computed_size(name):
    total, width, blocks = KNOWN[name]
    with init_empty_weights():
        transformer = CogVideoXTransformer3DModel(**PUBLISHED_TRANSFORMERS[name] | SHORT)
    assert parameters(transformer) == total
    assert (transformer_width(transformer.config), len(transformer.transformer_blocks)) == (width, blocks)
    inject_adapter_in_model(EraserConfig(r=128), transformer, low_cpu_mem_usage=True)
    assert parameters(transformer) - total == eraser_size(transformer.config, 128)


@pytest.mark.parametrize("name", KNOWN)
def test_sizes_by_rank_are_the_known_ones(name):
    config = PUBLISHED_TRANSFORMERS[name]
    for rank, millions in SIZES[transformer_width(config)].items():
        assert eraser_size(config, rank) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_some_layers_have_their_share():
    config = PUBLISHED_TRANSFORMERS["CogVideoX-2b"]
    assert eraser_size(config, 128, num_layers=1) == 493_568
    assert eraser_size(config, 128, num_layers=30) == eraser_size(config, 128) == 14_807_040


@pytest.mark.parametrize("rank", [0, -1, 1921])
def test_a_rank_outside_the_width_is_an_error(rank):
    with pytest.raises(ValueError, match=f"`rank` must be from 1 to .* 1920, got {rank}"):
        eraser_size(PUBLISHED_TRANSFORMERS["CogVideoX-2b"], rank)


@pytest.mark.parametrize("num_layers", [0, 31])
def test_more_layers_than_there_are_is_an_error(num_layers):
    with pytest.raises(ValueError, match=f"`num_layers` must be from 1 to .* 30, got {num_layers}"):
        eraser_size(PUBLISHED_TRANSFORMERS["CogVideoX-2b"], 128, num_layers)
