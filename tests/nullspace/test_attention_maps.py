from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from diffusers.models.attention_processor import Attention

from diffusers_ext.nullspace.attention_maps import attention_maps, attention_probabilities, map_size
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_models import pixart

PROMPT = "a red seven"
RUN = {"num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.fixture
def pipeline():
    return random_digits_pipeline()


def state(pipeline) -> dict:
    """All that looking could have changed."""
    unet = pipeline.unet
    return {
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules()],
        "processors": [id(processor) for processor in unet.attn_processors.values()],
        "training": [module.training for module in unet.modules()],
        "weights": {name: value.clone() for name, value in unet.state_dict().items()},
        "scheduler": id(pipeline.scheduler),
        "scheduler_state": copy.deepcopy(vars(pipeline.scheduler)),
        "progress_bar": copy.deepcopy(pipeline._progress_bar_config),
    }


def assert_untouched(pipeline, before: dict) -> None:
    after = state(pipeline)
    weights_before, weights_after = before.pop("weights"), after.pop("weights")
    assert all(torch.equal(weights_before[name], weights_after[name]) for name in weights_before)
    assert repr(after) == repr(before)


def test_the_picture_is_the_one_drawn_without_looking_and_the_model_is_untouched(pipeline):
    plain = pipeline(PROMPT, generator=torch.Generator().manual_seed(5), **RUN).images[0]
    before = state(pipeline)
    maps = attention_maps(pipeline, PROMPT, seed=5, **RUN)
    assert_untouched(pipeline, before)
    assert np.array_equal(np.asarray(maps.image), np.asarray(plain))
    again = pipeline(PROMPT, generator=torch.Generator().manual_seed(5), **RUN).images[0]
    assert np.array_equal(np.asarray(again), np.asarray(plain))


def test_the_model_is_untouched_after_an_exception(pipeline, monkeypatch):
    before = state(pipeline)

    def break_down(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Attention, "get_attention_scores", break_down)
    with pytest.raises(RuntimeError, match="out of memory"):
        attention_maps(pipeline, PROMPT, **RUN)
    assert_untouched(pipeline, before)


def test_maps_have_one_row_per_step_and_the_tokens_of_the_prompt(pipeline):
    maps = attention_maps(pipeline, PROMPT, steps=[3, 0], **RUN)
    assert maps.tokens == ["<|startoftext|>", "a", "red", "seven", "<|endoftext|>"]
    assert maps.timesteps == [751, 1]
    assert len(maps.maps) == 7
    sizes = {layer.split(".attentions")[0]: tuple(kept.shape) for layer, kept in maps.maps.items()}
    assert sizes == {
        "down_blocks.0": (2, 5, 8, 8),
        "down_blocks.1": (2, 5, 4, 4),
        "mid_block": (2, 5, 4, 4),
        "up_blocks.0": (2, 5, 4, 4),
        "up_blocks.1": (2, 5, 8, 8),
    }
    for kept in maps.maps.values():
        assert kept.dtype == torch.float32
        assert kept.min() > 0
        assert kept.sum(1).max() < 1  # the padding has the rest


def test_maps_are_what_the_layers_compute(pipeline):
    """The attention's own output is the maps, taken per head, times the values."""
    layer = "up_blocks.1.attentions.1.transformer_blocks.0.attn2"
    attention = pipeline.unet.get_submodule(layer)
    calls = []
    handle = attention.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args[0], kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    maps = attention_maps(pipeline, PROMPT, layers=[6], steps=[2], **RUN)
    handle.remove()
    assert list(maps.maps) == [layer]
    hidden_states, text = (part[1] for part in calls[2])  # the conditional half of the third step
    query, key = attention.to_q(hidden_states), attention.to_k(text)
    heads = zip(query.chunk(attention.heads, dim=-1), key.chunk(attention.heads, dim=-1))
    scores = [(q @ k.T * q.shape[-1] ** -0.5).softmax(-1) for q, k in heads]
    expected = torch.stack(scores).mean(0)[:, :5].T.reshape(5, 8, 8)
    torch.testing.assert_close(maps.maps[layer][0], expected.detach(), rtol=1e-5, atol=1e-7)


def test_the_conditional_half_is_kept(pipeline):
    """At the first step the latents are the same with and without guidance."""
    guided = attention_maps(pipeline, PROMPT, steps=[0], **RUN)
    plain = attention_maps(pipeline, PROMPT, steps=[0], num_inference_steps=4, guidance_scale=1.0)
    for layer, kept in guided.maps.items():
        torch.testing.assert_close(kept, plain.maps[layer], rtol=1e-4, atol=1e-7)


def test_schedulers_with_more_timesteps_than_steps_are_read_to_the_end(pipeline):
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    assert attention_maps(pipeline, PROMPT, **RUN).timesteps == [751, 501, 501, 251, 1]
    assert attention_maps(pipeline, PROMPT, steps=[4], **RUN).timesteps == [1]


def test_probabilities_of_every_position_sum_to_one():
    attention = Attention(query_dim=16, cross_attention_dim=8, heads=2, dim_head=4).eval()
    generator = torch.manual_seed(0)
    query, key = (torch.randn(1, n, 8, generator=generator) for n in (6, 5))
    probabilities = attention_probabilities(attention, query, key)
    assert probabilities.shape == (6, 5)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(6))


@pytest.mark.parametrize(
    ("latent_size", "positions", "expected"),
    [((8, 8), 64, (8, 8)), ((8, 8), 16, (4, 4)), ((5, 7), 12, (3, 4)), ((5, 7), 4, (2, 2))],
)
def test_map_size_halves_upwards(latent_size, positions, expected):
    assert map_size(latent_size, positions) == expected


def test_map_size_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"`positions` must be .* halved, got 13"):
        map_size((5, 7), 13)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": [4]}, r"`steps` must be from 0 to 3, got \[4\]"),
        ({"steps": []}, r"`steps` must be from 0 to 3, got \[\]"),
        ({"layers": [7]}, "`layers` must be 'all' or indices from 0 to 6"),
        ({"prompt": "a red seven " * 6}, "Every prompt must fit the tokenizer"),
        ({"prompt": 3}, "`prompt` must be a non-empty list of strings"),
    ],
)
def test_unfit_arguments_are_refused(pipeline, arguments, message):
    before = state(pipeline)
    with pytest.raises(ValueError, match=message):
        attention_maps(pipeline, **{"prompt": PROMPT, **RUN, **arguments})
    assert_untouched(pipeline, before)


def test_fused_projections_are_refused(pipeline):
    pipeline.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        attention_maps(pipeline, PROMPT, **RUN)


def test_other_denoisers_are_refused(pipeline):
    pipeline.unet = None
    pipeline.transformer = pixart().model
    with pytest.raises(TypeError, match="must have a UNet2DConditionModel, got .*PixArt"):
        attention_maps(pipeline, PROMPT, **RUN)
