from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.nullspace.collect import collect_statistics, sampled_timesteps
from diffusers_ext.nullspace.npy_tree_pictures import (
    draw_layer_attention,
    plot_covariance_statistics,
    plot_layer_attention,
)
from diffusers_ext.nullspace.plots import at_steps, attention_maps, spread_steps
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


def test_statistics_tell_rank_null_dimensions_and_condition(tmp_path, pipeline):
    statistics = collect_statistics(
        pipeline, ["a red seven"], features=("q", "k", "v"), num_inference_steps=2, show_progress=False
    )
    figure = plot_covariance_statistics(statistics, tmp_path / "a" / "b.png", threshold=1e-2)
    rank, null, ranges, condition = figure.axes
    row = [text.get_text() for text in rank.get_yticklabels()].index("text (14 Linears)")
    found = statistics.validate()["text"]
    assert rank.texts[row].get_text() == f"{found['rank']} of 128"
    below = int((statistics.spectrum("text").values < 1e-2).sum())
    assert null.texts[row].get_text() == f"{below} of 128"
    assert condition.texts[row].get_text() == "singular"
    assert "threshold 0.01" in ranges.get_legend().get_texts()[0].get_text()
    assert np.asarray(Image.open(tmp_path / "a" / "b.png").convert("L")).std() > 10
