from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from diffusers_ext.eraser.component_memory import ComponentMemory
from diffusers_ext.eraser.sizes import eraser_size
from diffusers_ext.planning import (
    EraserSetting,
    PipelineConfigs,
    card_fit,
    eraser_training,
    plan_eraser_training,
    read_pipeline_configs,
    recommend_eraser_training,
)
from tests.tiny_cogvideox import tiny_video_pipeline


SETTING = EraserSetting(rank=8, target_points=10, preserved_points=20)


@pytest.fixture(scope="module")
def configs():
    pipeline = tiny_video_pipeline()
    parts = (
        pipeline.transformer.config,
        pipeline.vae.config,
        pipeline.text_encoder.config.to_dict(),
    )
    return PipelineConfigs(*map(dict, parts))


def test_phases_are_sums_of_parts(configs):
    plan = plan_eraser_training(configs, SETTING)
    parts = plan.parts
    assert (plan.setting.num_frames, plan.setting.height, plan.setting.width) == (9, 16, 16)
    assert parts["eraser"] == 4 * eraser_size(configs.transformer, 8)
    always = parts["transformer"] + parts["eraser"] + parts["optimizer"]
    step = parts["gradients"] + parts["student's activations"]
    assert plan.phases["training"] == always + step
    assert plan.phases["sampling"] == parts["transformer"] + parts["teacher's pass"]
    assert plan.phases["text"] == parts["text encoder"] + parts["text encoder's activations"]
    assert plan.peak == max(plan.phases.values())
    assert plan.samples == (3 * 10 + 2 * 20) * 3 * 4 * 4 * 4 * 4
    half = replace(SETTING, storage_dtype=torch.float16)
    assert plan_eraser_training(configs, half).samples == plan.samples // 2


def test_rows_in_turn_take_less_than_rows_in_one_pass(configs):
    together = replace(SETTING, target_rows=4, preserved_rows=4, gradient_checkpointing=False)
    plans = [
        plan_eraser_training(configs, replace(together, rows_in_turn=turn))
        for turn in (False, True)
    ]
    student = [plan.parts["student's activations"] for plan in plans]
    assert student[1] < 0.6 * student[0]


def test_videos_and_validation_need_the_vae(configs):
    plan = plan_eraser_training(configs, replace(SETTING, latents_source="video", validation=True))
    assert set(plan.phases) == {"text", "training", "encoding", "validation"}
    kept = sum(plan.parts[name] for name in ("transformer", "eraser", "optimizer", "VAE"))
    assert plan.phases["validation"] == kept + plan.parts["VAE's decoding"]
    assert plan.samples == 0


def test_folders_are_read(tmp_path, configs):
    for name, config in configs._asdict().items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    assert read_pipeline_configs(tmp_path).transformer["num_layers"] == 2
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match="without .*vae"):
        read_pipeline_configs(tmp_path)


def test_published_models_are_known_by_name():
    assert read_pipeline_configs("zai-org/CogVideoX-5b").transformer["num_layers"] == 42
    assert read_pipeline_configs("cogvideox1.5-5b").transformer["patch_size_t"] == 2
    with pytest.raises(ValueError, match="`model` must be a folder or one of"):
        read_pipeline_configs("CogVideoX-7b")


def test_the_peaks_of_5b_in_the_published_size():
    plan = plan_eraser_training("CogVideoX-5b", EraserSetting(rows_in_turn=True))
    # 42 block inputs of 17,776 tokens of width 3072 in bf16
    checkpoints = 42 * 17_776 * 3072 * 2
    assert plan.parts["transformer"] == 2 * 5_570_283_072
    assert checkpoints < plan.parts["student's activations"] < 2 * checkpoints
    assert 15 < plan.phases["training"] / 2**30 <= 20


def test_bad_settings(configs):
    with pytest.raises(ValueError, match="`rank` must be from 1 to the transformer's width 32"):
        plan_eraser_training(configs, EraserSetting(rank=33))
    with pytest.raises(ValueError, match="`num_frames` must be a multiple of 8 plus 1"):
        plan_eraser_training(configs, replace(SETTING, num_frames=10))
    with pytest.raises(ValueError, match="`latents_source` must be one of"):
        EraserSetting(latents_source="dream")
    with pytest.raises(ValueError, match="`sampling_batch_size` must be at least 1, got 0"):
        EraserSetting(sampling_batch_size=0)


def test_cards_of_any_size(configs, monkeypatch):
    monkeypatch.setattr(card_fit, "_MOST_ROWS", 2)
    small_encoder = ComponentMemory(1, 1)  # or it would be the worst phase of so small a model
    monkeypatch.setattr(eraser_training, "text_encoder_memory", lambda *_: small_encoder)
    frugal = replace(SETTING, rows_in_turn=True, sampling_batch_size=1, num_frames=17)
    least = plan_eraser_training(configs, frugal).peak

    def fit(size):
        return recommend_eraser_training(configs, size / 2**30, frugal, reserve_gib=0)

    large = fit(100 * least)
    assert large.fits
    assert not large.plan.setting.gradient_checkpointing
    assert large.plan.setting.target_rows == 2
    assert not large.plan.setting.rows_in_turn
    exactly = fit(least + 1)
    assert exactly.fits
    assert exactly.plan.setting.rows_in_turn
    assert exactly.plan.setting.num_frames == 17
    shorter = fit(least - 1)
    assert shorter.fits
    assert shorter.plan.setting.num_frames == 9
    none = fit(1000)
    assert not none.fits
    assert none.missing == none.plan.peak - none.available
    with pytest.raises(ValueError, match="`memory_gib` must be above the reserve 1.0, got 0.5"):
        recommend_eraser_training(configs, 0.5, frugal)
