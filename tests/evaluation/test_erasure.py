from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from peft import inject_adapter_in_model

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.model import register_eraser
from diffusers_ext.eraser.adapter.outputs import eraser_layers
from diffusers_ext.evaluation.clip_figures import clip_drift, motion
from diffusers_ext.evaluation.erasure import (
    clip_shots,
    draw_base_clips,
    erasers_at_scale,
    evaluate_erasure,
    find_erasers,
    list_aspects,
    measure_pairs,
)
from diffusers_ext.evaluation.rendering import render_clips
from tests.tiny_cogvideox import tiny_video_pipeline

PROMPTS = {"preserved": ["a", "b"], "other words": ["s"], "target": ["s", "t", "s"]}


def test_every_entry_gets_clips_with_seeds_of_their_own():
    shots = clip_shots(PROMPTS, 2, seed=0)
    assert [(s.group, s.prompt, s.index) for s in shots if s.group == "target"] == [
        *(("target", "s", 0), ("target", "s", 1), ("target", "t", 0), ("target", "t", 1)),
        *(("target", "s", 2), ("target", "s", 3)),
    ]
    assert shots[0].group == "target"  # whatever the order of the groups
    target = [shot.seed for shot in shots if shot.group == "target"]
    assert len(set(target)) == 6
    assert all(0 <= shot.seed < 2**63 for shot in shots)
    assert {shot.seed for shot in clip_shots(PROMPTS, 2, seed=1)}.isdisjoint(target)


def test_a_seed_depends_on_its_prompt_alone():
    alone = clip_shots({"target": ["t"], "preserved": ["b"]}, 2, seed=0)
    among = clip_shots(PROMPTS, 2, seed=0)
    assert set(alone) <= set(among)


def test_given_seeds_are_of_first_clips():
    given = {"target": [7, None, 9]}
    shots = [s for s in clip_shots(PROMPTS, 2, seed=0, seeds=given) if s.group == "target"]
    derived = [s for s in clip_shots(PROMPTS, 2, seed=0) if s.group == "target"]
    assert [shots[0].seed, shots[4].seed] == [7, 9]
    assert shots[2:4] == derived[2:4]
    assert len({shot.seed for shot in shots}) == 6


@pytest.mark.parametrize(
    ("groups", "count", "seeds", "message"),
    [
        (PROMPTS, 0, None, "`num_videos_per_prompt` must be at least 1, got 0"),
        ({"target": ["a"]}, 1, None, r"got none of \['preserved'\]"),
        ({"target": [], "preserved": ["a"]}, 1, None, r"got none of \['target'\]"),
        ({"target": ["a"], "preserved": ["a"]}, 1, None, r"in 'target' and in 'preserved', got \['a'\]"),
        ({"target": "a", "preserved": ["b"]}, 1, None, "`target` must be a list of prompts"),
        (PROMPTS, 1, {"target": [1]}, r"one entry per prompt of 'target' \(3\), got 1"),
    ],
)  # fmt: skip
def test_other_prompts_are_refused(groups, count, seeds, message):
    with pytest.raises(ValueError, match=message):
        clip_shots(groups, count, 0, seeds)


def test_rows_hold_what_was_judged_and_measured():
    shots = clip_shots({"target": ["s"], "preserved": ["a"]}, 1, 0)
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (2, 4, 8, 8, 3), dtype=np.uint8)
    clips = {"base": base, "erased": np.zeros_like(base)}

    def judge(clips: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
        mask = [prompt == "a" for prompt in prompts]
        return {"bright": np.ma.array(clips.mean(axis=(1, 2, 3, 4)) > 50, mask=mask), "prompt": np.array(prompts)}

    rows = measure_pairs(shots, clips, judge)
    assert [row["base/bright"] for row in rows] == [True, None]
    assert [row["erased/bright"] for row in rows] == [False, None]
    assert [row["erased/prompt"] for row in rows] == ["s", "a"]
    assert [row["base/motion"] for row in rows] == motion(base).tolist()
    assert [row["erased/drift"] for row in rows] == clip_drift(base, clips["erased"]).tolist()
    assert [row["base/degenerate"] for row in rows] == ["noise", "noise"]
    assert [row["erased/degenerate"] for row in rows] == ["blank", "blank"]
    assert [row["seed"] for row in rows] == [shot.seed for shot in shots]
    assert "base/drift" not in rows[0]
    assert list_aspects(rows) == ["bright"]


GROUPS = {"target": ["a red seven moving right", "the blue seven goes up"], "preserved": ["a red one moving right"]}
CALL = {"num_frames": 9, "height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 2.0}
QUIET = {**CALL, "show_progress": False, "batch_size": 2}


def judge(clips: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
    """Whether red is strong, and how light a clip is."""
    means = clips.mean(axis=(1, 2, 3))
    return {"red": means[:, 0] > means[:, 1], "light": means.mean(axis=1)}


@pytest.fixture
def pipeline() -> CogVideoXPipeline:
    """With two erasers that show, of which the first is on."""
    register_eraser()
    pipeline = tiny_video_pipeline()
    torch.manual_seed(1)
    for name in ("seven", "two"):
        config = EraserConfig(r=4, init_weights=False)
        inject_adapter_in_model(config, pipeline.transformer, name)
    for layer in eraser_layers(pipeline.transformer).values():
        layer.set_adapter("seven")
        layer.set_scale("seven", 3.0)
    return pipeline


def state(pipeline: CogVideoXPipeline) -> list[tuple]:
    return [
        (layer.active_adapters, layer.disable_adapters, layer.bypassed, dict(layer.scaling))
        + tuple(x.item() for x in layer.scale_tensors.values())
        + tuple(p.requires_grad for p in layer.parameters())
        for layer in eraser_layers(pipeline.transformer).values()
    ]


def drifts(report, side: str) -> list[float]:
    return [row[f"{side}/drift"] for row in report.rows]


def test_sides_share_seeds_and_the_pipeline_comes_back(pipeline):
    before = state(pipeline)
    pipeline.transformer.train()
    report = evaluate_erasure(
        pipeline, GROUPS, judge, concept_aspect="red", scales=[0.0, 0.5, 1.0], kept_clips=1, **QUIET
    )
    assert state(pipeline) == before
    assert pipeline.transformer.training
    assert report.sides == ["scale 0", "scale 0.5", "scale 1"]
    assert drifts(report, "scale 0") == [0, 0, 0]
    half, whole = drifts(report, "scale 0.5"), drifts(report, "scale 1")
    assert all(0 < h < w for h, w in zip(half, whole, strict=True))
    assert [(one.group, len(one.clips)) for one in report.kept] == [("target", 4), ("preserved", 4)]
    # The last side is what a plain call draws.
    first = report.rows[0]
    drawn = render_clips(pipeline, [first["prompt"]], seeds=[first["seed"]], show_progress=False, **CALL)
    assert np.array_equal(drawn[0], report.kept[0].clips["scale 1"])
    assert first["scale 1/light"] == drawn.mean()
    assert report.settings["erasers"] == ["seven"]
    assert report.settings["judge"]["name"] == "judge"


def test_clips_do_not_depend_on_the_batch_and_the_base_may_be_drawn_before(pipeline):
    report = evaluate_erasure(pipeline, GROUPS, judge, kept_clips=9, seed=5, **QUIET)
    assert report.sides == ["erased"]
    assert report.settings["concept_aspect"] == "red"  # the only verdict
    base = draw_base_clips(pipeline, GROUPS, seed=5, batch_size=3, **CALL)
    given = evaluate_erasure(pipeline, GROUPS, judge, seed=5, base_clips=base, **{**QUIET, "batch_size": 3})
    assert base.shape == (3, 9, 16, 16, 3)
    for one, clip in zip(report.kept, base, strict=True):
        assert np.abs(one.clips["base"].astype(int) - clip).max() <= 1
    assert drifts(given, "erased") == pytest.approx(drifts(report, "erased"), rel=0.02)
    with pytest.raises(ValueError, match="must hold the 3 clips of `groups`, got 2"):
        evaluate_erasure(pipeline, GROUPS, judge, base_clips=base[:2], **QUIET)


def test_named_erasers_are_on_alone_and_together(pipeline):
    before = state(pipeline)
    assert find_erasers(pipeline) == ["seven"]
    for names in (["seven"], ["two"], ["two", "seven"]):
        with erasers_at_scale(pipeline, names, 2.0):
            layer = eraser_layers(pipeline.transformer)["transformer_blocks.0.attn1"]
            assert list(layer.active_adapters) == names
            assert layer.scaling == {"seven": 6.0 if "seven" in names else 3.0, "two": 2.0 if "two" in names else 1.0}
        assert state(pipeline) == before
    single = evaluate_erasure(pipeline, GROUPS, judge, adapter_name="two", **QUIET)
    both = evaluate_erasure(pipeline, GROUPS, judge, adapter_name=["seven", "two"], **QUIET)
    assert drifts(single, "erased") != drifts(both, "erased")
    assert both.settings["erasers"] == ["seven", "two"]


def test_an_exception_leaves_the_pipeline_as_it_was(pipeline):
    before, scheduler = state(pipeline), pipeline.scheduler
    with pytest.raises(ValueError, match="must give a dictionary"):
        evaluate_erasure(pipeline, GROUPS, lambda clips, prompts: None, scales=[0.0, 2.0], **QUIET)
    with pytest.raises(RuntimeError, match="stop"), erasers_at_scale(pipeline, ["two"], 0.0):
        raise RuntimeError("stop")
    assert state(pipeline) == before
    assert pipeline.scheduler is scheduler


def test_an_eraser_without_effect_is_told(pipeline, caplog):
    with caplog.at_level(logging.WARNING):
        evaluate_erasure(pipeline, GROUPS, judge, scales=[0.0], **QUIET)
    assert "The erasers changed no clip" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapter_name": "nine"}, r"`adapter_name` must name erasers .*'seven', 'two'\], got \['nine'\]"),
        ({"scales": []}, r"`scales` must hold different finite numbers, got \[\]"),
        ({"scales": [1.0, 1.0]}, "`scales` must hold different"),
        ({"scales": [float("nan")]}, "`scales` must hold different finite"),
        ({"groups": {**GROUPS, "all": ["x"]}}, "`groups` must not be named 'all'"),
        ({"groups": {"target": ["x"]}}, r"got none of \['preserved'\]"),
        ({"concept_aspect": "digit"}, r"one of the judge's verdicts \['red'\], got 'digit'"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_erasure(pipeline, **{"groups": GROUPS, "judge": judge, **QUIET, **arguments})


def test_a_pipeline_without_active_erasers_is_refused(pipeline):
    for layer in eraser_layers(pipeline.transformer).values():
        layer.enable_adapters(False)
    with pytest.raises(ValueError, match=r"must name erasers .*, got \[\]. Load one"):
        evaluate_erasure(pipeline, GROUPS, judge, **QUIET)
    with pytest.raises(ValueError, match=r"must name erasers of the pipeline, \[\]"):
        evaluate_erasure(tiny_video_pipeline(), GROUPS, judge, **QUIET)


def test_clips_that_are_not_finite_are_refused(pipeline):
    for layer in eraser_layers(pipeline.transformer).values():
        layer.eraser_up["seven"].bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="must draw finite clips, got NaN .* 'a red seven"):
        evaluate_erasure(pipeline, GROUPS, judge, **QUIET)
