"""Attacks on erasers, in the report and against a tiny model."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from peft import inject_adapter_in_model

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.model import register_eraser
from diffusers_ext.eraser.adapter.outputs import eraser_layers, erasers_disabled
from diffusers_ext.evaluation.erasure import evaluate_erasure
from diffusers_ext.evaluation.erasure_attacks import (
    LearnedEmbeddings,
    LoweredScale,
    NoiseRestart,
    OtherFinetuning,
    base_run,
    make_attacks,
    not_covered,
)
from diffusers_ext.evaluation.rendering import render_clips
from diffusers_ext.evaluation.settings import AttackSettings
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.tiny_current_pipelines import tiny_wan_pipeline

GROUPS = {"target": ["a red seven moving right", "the blue seven goes up"], "preserved": ["a red one moving right"]}
CALL = {"num_frames": 9, "height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 2.0}


def judge(clips: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
    """Whether red is strong, and how light a clip is."""
    means = clips.mean(axis=(1, 2, 3))
    return {"red": means[:, 0] > means[:, 1], "light": means.mean(axis=1)}


@pytest.fixture(scope="module")
def pipeline() -> CogVideoXPipeline:
    """With an eraser that shows."""
    register_eraser()
    pipeline = tiny_video_pipeline()
    torch.manual_seed(1)
    inject_adapter_in_model(EraserConfig(r=4, init_weights=False), pipeline.transformer, "seven")
    for layer in eraser_layers(pipeline.transformer).values():
        layer.set_scale("seven", 3.0)
    return pipeline


@pytest.fixture(scope="module")
def report(pipeline):
    attacks = [
        LoweredScale(0.5),
        NoiseRestart(0.5),
        LearnedEmbeddings(2, steps=3, num_clips=2),
        OtherFinetuning(steps=2, num_clips=2),
    ]
    return evaluate_erasure(
        pipeline, GROUPS, judge, concept_aspect="red", attacks=attacks, batch_size=3, show_progress=False, **CALL
    )


def of_group(report, group: str) -> list[dict]:
    return [row for row in report.rows if row["group"] == group]


def test_attacked_clips_are_groups_beside_the_same_base(report):
    groups = [group for group in report.groups if group.startswith("attack: ")]
    assert groups == [
        "attack: scale 0.5",
        "attack: noise restart 0.5",
        "attack: 2 learned embeddings",
        "attack: 2 LoRA steps on other clips",
    ]
    plain = of_group(report, "target")
    for group in groups:
        rows = of_group(report, group)
        assert [row["seed"] for row in rows] == [row["seed"] for row in plain]
        assert [row["base/light"] for row in rows] == [row["base/light"] for row in plain]
        assert all(row["erased/light"] != usual["erased/light"] for row, usual in zip(rows, plain, strict=True)), group
    assert report.groups["all"]["clips"] == 3
    assert {one.group for one in report.kept} == {"target", "preserved", *groups}
    assert report.settings["attacks"]["attack: 2 learned embeddings"]["first_loss"] > 0


def test_flow_matching_models_are_attacked_too():
    pipeline = tiny_wan_pipeline()
    inject_adapter_in_model(EraserConfig(r=4, init_weights=False), pipeline.transformer, "seven")
    attacks = [
        NoiseRestart(0.5),
        LearnedEmbeddings(2, steps=2, num_clips=1, batch_size=1),
        OtherFinetuning(steps=1, num_clips=1, batch_size=1),
    ]
    groups = {"target": GROUPS["target"][:1], "preserved": GROUPS["preserved"]}
    call = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0}
    found = evaluate_erasure(
        pipeline, groups, judge, concept_aspect="red", attacks=attacks, batch_size=2, show_progress=False, **call
    )
    drifts = [row["erased/drift"] for row in found.rows if row["group"] != "preserved"]
    assert len(set(drifts)) == 4


def test_a_lowered_scale_is_that_scale(pipeline, report):
    alone = evaluate_erasure(
        pipeline, GROUPS, judge, concept_aspect="red", scales=[0.5], batch_size=2, show_progress=False, **CALL
    )
    found = [row["erased/light"] for row in of_group(report, "attack: scale 0.5")]
    assert found == [row["scale 0.5/light"] for row in of_group(alone, "target")]


def test_the_table_names_the_worst_attack_first_and_what_was_not_tried(report):
    report.settings["not_covered"] = not_covered(AttackSettings(attacks=["scale", "noise_restart"]))
    table = report.to_table()
    assert table.startswith("| concept seen | clips | base | erased |")
    assert "- not asked for: paraphrase, learned_embeddings, finetune, prompt_file\n" in table
    shares = [float(line.split("|")[4].split()[0]) for line in table.splitlines()[2:7]]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(("strength", "left"), [(0.75, 3), (0.5, 2), (0.25, 1)])
def test_a_restart_leaves_so_many_steps_to_the_erased_model(pipeline, strength, left):
    """Without its eraser and noise, the model would go on from the base's own states."""
    shots = [type("Shot", (), {"prompt": GROUPS["target"][0], "seed": 5})()]
    states, times = base_run(pipeline, [shots[0].prompt], [5], CALL)
    pipeline.scheduler.set_timesteps(4)  # as a call does before its first step
    with NoiseRestart(strength).active(pipeline, shots, CALL) as further:
        put_back = further["callback_on_step_end"]
        put = []
        for step in range(4):
            values = put_back(pipeline, step, times[step], {"latents": states[step]})
            put.append(bool(values))
            if values:
                alpha = pipeline.scheduler.alphas_cumprod[times[step + 1]]
                noise = (values["latents"] - alpha**0.5 * states[-1]) / (1 - alpha) ** 0.5
                assert 0.8 < noise.std() < 1.2
    assert put == [True] * (4 - left) + [False] * left


def test_a_run_of_the_base_ends_in_its_clip(pipeline):
    states, times = base_run(pipeline, GROUPS["preserved"], [3], CALL)
    assert len(states) == len(times) == 4
    prompts = GROUPS["preserved"]
    with torch.no_grad():
        frames = pipeline.decode_latents(states[-1])
    clip = pipeline.video_processor.postprocess_video(frames, "np")
    with erasers_disabled(pipeline.transformer):
        drawn = render_clips(pipeline, prompts, seeds=[3], show_progress=False, **CALL)
    assert np.array_equal((clip * 255).round().astype(np.uint8), drawn)


def test_settings_make_their_attacks_in_order():
    settings = AttackSettings(
        attacks=["scale", "learned_embeddings", "finetune", "noise_restart"],
        attack_scale=[0.9, 0.1],
        attack_steps=7,
        attack_restarts=3,
        finetuning_steps=9,
    )
    made = make_attacks(settings, 4)
    assert [type(one) for one in made] == [
        LoweredScale, LoweredScale, LearnedEmbeddings, OtherFinetuning, NoiseRestart
    ]  # fmt: skip
    assert (made[2].steps, made[2].restarts, made[2].seed, made[3].steps, made[3].seed) == (7, 3, 4, 9, 4)


def test_attacks_need_one_scale(pipeline):
    with pytest.raises(ValueError, match="`scales` must be one scale where there are `attacks`, got"):
        evaluate_erasure(pipeline, GROUPS, judge, scales=[0.5, 1], attacks=[LoweredScale(0.5)], **CALL)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attacks": ["scales"]}, "got 'scales'. Did you mean 'scale'?"),
        ({"attacks": ["prompt_file:"]}, "got 'prompt_file:'."),
        ({"attacks": ["scale", "scale"]}, "`attacks` must name each attack once"),
        ({"attack_scale": [1.0]}, "`attack_scale` must be above 0 and below 1, got"),
    ],
)
def test_unknown_attacks_are_refused(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AttackSettings(**given)
