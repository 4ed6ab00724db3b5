"""Evaluation and attacks of erasers on families of every kind: videos, also from first frames, pictures, experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, HunyuanVideo15Pipeline, WanPipeline
from peft import inject_adapter_in_model
from PIL import Image

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.outputs import eraser_layers
from diffusers_ext.eraser.fit import erased_models
from diffusers_ext.evaluation.erasure import draw_base_clips, erasers_at_scale, evaluate_erasure, find_erasers
from diffusers_ext.evaluation.erasure_attacks import LearnedEmbeddings, LoweredScale, NoiseRestart, OtherFinetuning
from diffusers_ext.evaluation.rendering import render_clips
from tests.evaluation.test_erasure_attacks import GROUPS, judge
from tests.tiny_cogvideox import tiny_image_to_video_pipeline
from tests.tiny_current_pipelines import (
    tiny_flux2_pipeline,
    tiny_ltx2_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)
from tests.tiny_hunyuan_video import few_tokens, tiny_hunyuan_video15_pipeline, tiny_hunyuan_video_pipeline
from tests.tiny_image_pipelines import tiny_sd3_pipeline
from tests.tiny_pipelines import sdxl_pipeline


class Setting(NamedTuple):
    """A tiny pipeline and what its clips need besides."""

    build: Callable[[], DiffusionPipeline]
    call: dict[str, Any]
    frames: int


def small_flux2() -> Flux2KleinPipeline:
    """Of fewer tokens than the call's default."""
    pipeline = tiny_flux2_pipeline()
    pipeline.tokenizer.model_max_length = 24
    return pipeline


def small_hunyuan_video15() -> HunyuanVideo15Pipeline:
    with few_tokens():
        return tiny_hunyuan_video15_pipeline()


def two_experts() -> WanPipeline:
    parts = tiny_wan_pipeline().components
    pipeline = WanPipeline(**{**parts, "transformer_2": copy.deepcopy(parts["transformer"])}, boundary_ratio=0.9)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PROMPTS = {**GROUPS, "target": GROUPS["target"][:1]}
SEEDS = {"target": [3]}
SIDE = {"height": 32, "width": 32}
FIRST = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
FAMILIES = {
    "cogvideox image-to-video": Setting(
        tiny_image_to_video_pipeline, {"height": 16, "width": 16, "num_frames": 9, "first_frames": FIRST}, 9
    ),
    "hunyuan_video": Setting(tiny_hunyuan_video_pipeline, {**SIDE, "num_frames": 5}, 5),
    "flux2": Setting(small_flux2, SIDE, 1),
    "z_image": Setting(tiny_z_image_pipeline, SIDE, 1),
    "sd3": Setting(tiny_sd3_pipeline, {**SIDE, "num_frames": 1}, 1),
    "sdxl": Setting(sdxl_pipeline, {**SIDE, "negative_prompt": "blue"}, 1),
}
QUIET = {"concept_aspect": "red", "show_progress": False, "num_inference_steps": 2, "guidance_scale": 2.0}
ATTACKS = ("scale 0.5", "noise restart 0.5", "2 learned embeddings", "1 LoRA steps on other clips")


def erased(build: Callable[[], DiffusionPipeline]) -> DiffusionPipeline:
    """With an eraser that shows."""
    pipeline = build()
    for model in erased_models(pipeline).values():
        torch.manual_seed(1)
        inject_adapter_in_model(EraserConfig(r=4, init_weights=False), model, "seven")
        for layer in eraser_layers(model).values():
            layer.set_scale("seven", 3.0)
    return pipeline


@pytest.fixture(scope="module", params=FAMILIES)
def setting(request):
    return FAMILIES[request.param]


def attacks() -> list:
    return [
        LoweredScale(0.5),
        NoiseRestart(0.5),
        LearnedEmbeddings(2, steps=2, num_clips=1),
        OtherFinetuning(steps=1, num_clips=1),
    ]


def test_every_kind_of_family_is_drawn_judged_and_attacked(setting, tmp_path):
    pipeline = erased(setting.build)
    report = evaluate_erasure(
        pipeline, PROMPTS, judge, attacks=attacks(), batch_size=2, seeds=SEEDS, **QUIET, **setting.call
    )
    assert set(report.groups) == {"target", "preserved", "all", *(f"attack: {name}" for name in ATTACKS)}
    by_group = {group: [row for row in report.rows if row["group"] == group] for group in report.groups}
    plain = by_group["target"]
    assert all(row["erased/drift"] > 0 for row in plain)
    for name in ATTACKS:
        rows = by_group[f"attack: {name}"]
        assert [row["base/light"] for row in rows] == [row["base/light"] for row in plain]
        assert all(row["erased/light"] != usual["erased/light"] for row, usual in zip(rows, plain, strict=True)), name
    assert ("base/motion" in plain[0]) == (setting.frames > 1)
    assert all(clip.shape[0] == setting.frames for one in report.kept for clip in one.clips.values())
    report.save(tmp_path)
    endings = {path.suffix for path in (tmp_path / "clips").iterdir()}
    assert endings == {".gif" if setting.frames > 1 else ".png"}
    assert (tmp_path / "sheet.png").is_file()
    # The sides are what the pipeline draws by itself, on whatever side of a batch.
    alone = render_clips(pipeline, PROMPTS["target"], seeds=[3], **{**QUIET, **setting.call, "concept_aspect": None})
    shown = next(one for one in report.kept if one.seed == 3).clips["erased"]
    assert np.abs(alone[0].astype(int) - shown).max() <= 1


def test_a_call_without_a_scale_is_guided_by_its_guider_and_attacked_where_no_steps_are_watched():
    pipeline, call = erased(small_hunyuan_video15), {**SIDE, "num_frames": 5}
    with pytest.raises(ValueError, match="`attacks` must not hold .* for HunyuanVideo 1.5, whose pipeline shows no"):
        evaluate_erasure(pipeline, PROMPTS, judge, attacks=attacks(), seeds=SEEDS, **QUIET, **call)
    report = evaluate_erasure(pipeline, PROMPTS, judge, attacks=attacks()[:1], seeds=SEEDS, **QUIET, **call)
    shown = next(one for one in report.kept if one.seed == 3).clips["erased"]
    assert pipeline.guider.guidance_scale == 6.0
    pipeline.guider = pipeline.guider.new(guidance_scale=QUIET["guidance_scale"])
    generator = torch.Generator().manual_seed(3)
    frames = pipeline(*PROMPTS["target"], **call, num_inference_steps=2, generator=generator).frames[0]
    assert np.abs((frames * 255).round() - shown).max() <= 1


def test_clips_with_sound_are_drawn():
    pipeline, call = erased(tiny_ltx2_pipeline), {**SIDE, "num_frames": 3}
    pipeline.tokenizer.model_max_length = 16
    with pytest.raises(ValueError, match="`attacks` must not hold .* for LTX-2, whose pipeline shows no steps"):
        evaluate_erasure(pipeline, PROMPTS, judge, attacks=attacks(), seeds=SEEDS, **QUIET, **call)
    report = evaluate_erasure(pipeline, PROMPTS, judge, attacks=attacks()[:1], seeds=SEEDS, **QUIET, **call)
    assert all(row["erased/drift"] > 0 for row in report.rows if row["group"] == "target")


def test_a_clip_begins_with_the_picture_of_its_seed():
    pipeline = erased(tiny_image_to_video_pipeline)
    call = {**QUIET, "concept_aspect": None, **FAMILIES["cogvideox image-to-video"].call}
    prompts = ["a red seven"] * 2
    both = render_clips(pipeline, prompts, seeds=[4, 5], **call)
    call["first_frames"] = FIRST[1:]
    assert np.abs(render_clips(pipeline, prompts[:1], seeds=[5], **call)[0].astype(int) - both[1]).max() <= 1
    assert np.abs(render_clips(pipeline, prompts[:1], seeds=[4], **call)[0].astype(int) - both[0]).max() > 1


def test_erasers_of_all_experts_are_switched():
    pipeline = erased(two_experts)
    call = {"num_frames": 5, **SIDE}
    assert find_erasers(pipeline) == ["seven"]
    with erasers_at_scale(pipeline, ["seven"], 2.0):
        scales = {
            layer.scaling["seven"] for m in erased_models(pipeline).values() for layer in eraser_layers(m).values()
        }
        assert scales == {6.0}
    report = evaluate_erasure(
        pipeline, PROMPTS, judge, attacks=attacks()[:3], batch_size=2, seeds=SEEDS, **QUIET, **call
    )
    drawing = {name: QUIET[name] for name in ("num_inference_steps", "guidance_scale")}
    base = draw_base_clips(two_experts(), PROMPTS, seeds=SEEDS, batch_size=2, **drawing, **call)
    kept = [one.clips["base"] for one in report.kept if one.group in PROMPTS]
    assert np.array_equal(np.stack(kept), base)
    with pytest.raises(ValueError, match="`attacks` must not hold finetune for Wan with 2 transformers"):
        evaluate_erasure(pipeline, PROMPTS, judge, attacks=attacks()[3:], **QUIET, **call)


@pytest.mark.parametrize(
    ("build", "given", "message"),
    [
        (small_flux2, {"negative_prompt": "blue"}, "`negative_prompt` must be empty for FLUX.2, which takes none"),
        (tiny_hunyuan_video_pipeline, {"negative_prompt": "blue"}, "`negative_prompt` must be empty for HunyuanVideo"),
        (tiny_sd3_pipeline, {"num_frames": 9}, "`num_frames` must be 1 for a model that draws pictures, got 9"),
        (tiny_sd3_pipeline, {"first_frames": FIRST}, "`first_frames` must be None for a model that reads text alone"),
        (tiny_image_to_video_pipeline, {}, "`first_frames` must hold pictures for an image-to-video model, got none"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_do_is_refused_first(build, given, message):
    with pytest.raises(ValueError, match=message):
        evaluate_erasure(erased(build), PROMPTS, judge, **QUIET, **given)


def test_pipelines_that_show_no_steps_are_attacked_by_scale_alone(monkeypatch):
    pipeline = erased(tiny_sd3_pipeline)
    monkeypatch.setattr(type(pipeline), "__call__", lambda self, prompt, negative_prompt=None: None)
    LoweredScale(0.5).check(pipeline)
    for attack in attacks()[1:]:
        with pytest.raises(
            ValueError, match=f"`attacks` must not hold {attack.kind} for SD3, whose pipeline shows no"
        ):
            attack.check(pipeline)
