from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.nullspace.attention_maps import (
    AttentionMaps,
    at_steps,
    attention_maps,
    draw_layer_attention,
    mean_over_layers,
    plot_attention_maps,
    plot_layer_attention,
    spread_steps,
)
from diffusers_ext.nullspace.collect import sampled_timesteps
from tests.nullspace.pictures import assert_no_overlap, assert_picture
from tests.tiny_digits import random_digits_pipeline

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"
PROMPTS = ("a photo of the red digit $x_{", "a blue one")


@pytest.fixture(scope="module")
def pipeline():
    return random_digits_pipeline()


@pytest.fixture(scope="module")
def maps(pipeline):
    settings = {"steps": "all", "num_inference_steps": 2, "guidance_scale": 3.0, "layers": [0, 2]}
    return [attention_maps(pipeline, prompt, **settings) for prompt in PROMPTS]


def test_a_picture_for_every_timestep_and_layer(tmp_path, pipeline, maps):
    timesteps = sampled_timesteps(pipeline.scheduler, 2)
    assert [one.timesteps for one in maps] == [timesteps] * 2 == [[501, 1]] * 2
    files = draw_layer_attention(maps, tmp_path, show_progress=False)
    names = [f"attention_{layer.replace('.', '_')}.png" for layer in maps[0].maps]
    assert len(names) == 2
    assert {str(path.relative_to(tmp_path)) for path in files} == {
        f"timestep_{timestep:04d}/{name}" for timestep in timesteps for name in names
    }
    for path in files:
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
        assert pixels.shape[1] > 900
        assert pixels.std() > 10


def test_words_shares_prompts_and_scale_can_be_read(maps):
    figure = plot_layer_attention(maps, LAYER, 1)
    assert figure.get_suptitle() == f"{LAYER}, t = 1"
    axes, bar = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert '"a blue one"' in texts
    share = 100 * maps[1].maps[LAYER][1, 2].mean()
    assert f"blue {share:.1f} %" in texts
    assert len(axes.images) == sum(1 + len(one.tokens) for one in maps)
    assert "1 x" in [tick.get_text() for tick in bar.get_yticklabels()]
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    for index, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_a_map_is_bright_where_its_token_is_looked_at(maps):
    focus = torch.full((1, len(maps[1].tokens), 4, 4), 0.1)
    focus[0, 2, 3, 0] = 0.4
    figure = plot_layer_attention([maps[1]._replace(timesteps=[7], maps={"mid": focus})], "mid")
    shown = figure.axes[0].images[3].get_array()
    assert np.unravel_index(shown.argmax(), shown.shape) == (48, 0)
    assert shown.max() == pytest.approx(np.log2(0.4 / (1.9 / 16)), rel=1e-4)


def test_maps_of_other_layers_do_not_go_together(tmp_path, maps):
    other = maps[1]._replace(maps={LAYER: maps[1].maps[LAYER]})
    with pytest.raises(ValueError, match="`maps` must have the same layers and timesteps"):
        draw_layer_attention([maps[0], other], tmp_path)


def test_a_step_visited_twice_is_drawn_once(tmp_path, maps):
    twice = [one._replace(timesteps=[501, 501]) for one in maps]
    assert len(draw_layer_attention(twice, tmp_path, show_progress=False)) == 2


def test_an_overview_is_the_same_as_of_maps_at_its_steps(pipeline):
    settings = {"num_inference_steps": 8, "layers": [0]}
    every = attention_maps(pipeline, "a red one", steps="all", **settings)
    chosen = attention_maps(pipeline, "a red one", **settings)
    overview = at_steps(every, spread_steps(8))
    assert overview.timesteps == chosen.timesteps
    for layer, expected in chosen.maps.items():
        assert torch.equal(overview.maps[layer], expected)
    with pytest.raises(ValueError, match="`steps` must be 'all' or from 0 to 7, got 'some'"):
        attention_maps(pipeline, "a red one", steps="some", **settings)


@pytest.fixture(scope="module")
def three_steps(pipeline) -> AttentionMaps:
    return attention_maps(pipeline, "a red seven", num_inference_steps=3, guidance_scale=3.0)


def test_attention_maps_are_drawn_with_their_words_and_timesteps(tmp_path, three_steps):
    figure = plot_attention_maps(three_steps, tmp_path / "attention.png")
    axes = figure.axes[1]
    words = [tick.get_text().split("\n")[0] for tick in axes.get_xticklabels()]
    assert words == ["[start]", "a", "red", "seven", "[end]"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["t = 667", "t = 334", "t = 1"]
    assert_picture(tmp_path / "attention.png", 600, 300)
    assert_no_overlap(figure, [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.title])


def test_long_words_and_wide_pictures_fit(three_steps):
    wide = {"mid": torch.rand(3, 3, 2, 4, generator=torch.manual_seed(0))}
    tokens = ["an", "electroencephalograph", "of"]
    figure = plot_attention_maps(three_steps._replace(tokens=tokens, maps=wide))
    axes = figure.axes[1]
    assert axes.images[0].get_array().shape == (3 * 68 - 4, 3 * 132 - 4)
    assert_no_overlap(figure, [axes.title, *axes.get_yticklabels()])
    assert {text.get_rotation() for text in axes.get_xticklabels()} == {30.0}


def test_attention_maps_show_where_a_token_is_looked_at(three_steps):
    focus = torch.full((1, 2, 4, 4), 0.1)
    focus[0, 1, 3, 0] = 0.4
    figure = plot_attention_maps(AttentionMaps(["$x", "y_{"], [500], {"mid": focus}, three_steps.image))
    shown = figure.axes[1].images[0].get_array()
    assert shown.shape == (64, 132)
    first, second = shown[:, :64], shown[:, 68:]
    assert np.allclose(first, 0, atol=1e-6)
    assert np.unravel_index(second.argmax(), second.shape) == (48, 0)
    assert second.max() == pytest.approx(np.log2(0.4 / (1.9 / 16)), rel=1e-4)
    labels = [tick.get_text() for tick in figure.axes[1].get_xticklabels()]
    assert labels == ["$x\n10.0 %", "y_{\n11.9 %"]
    figure.canvas.draw()


def test_layers_are_averaged_at_the_finest_size(three_steps):
    coarse = torch.arange(4.0).reshape(1, 1, 2, 2)
    mean = mean_over_layers(three_steps._replace(maps={"a": coarse, "b": torch.zeros(1, 1, 4, 4)}))
    assert mean.shape == (1, 1, 4, 4)
    assert mean[0, 0, 0, 0] == 0
    assert mean[0, 0, 3, 3] == 1.5
    assert mean.mean() == pytest.approx(0.75)
