from __future__ import annotations

from dataclasses import replace

import pytest

from diffusers_ext.planning import plan as fit
from diffusers_ext.planning import plan_run, recommend_eraser_training
from diffusers_ext.planning.plan import GIB, RunPlan
from tests.tiny_cogvideox import tiny_video_pipeline

SETTING = {"rank": 8, "num_frames": 17, "mixed_precision": "no", "text_batch_size": 1}
SETTING["latents_source"] = "noise"  # or the teacher's sampling would be the worst phase


def test_gpus_of_any_size(tmp_path, monkeypatch):
    # Wide enough for its training to be the worst phase.
    tiny_video_pipeline(num_attention_heads=16, num_layers=2).save_pretrained(tmp_path)
    monkeypatch.setattr(fit, "_MOST_ROWS", 2)
    made = {}

    def plan_once(tool, model, memory_gib, **setting):
        """What a run takes does not depend on the memory that there is."""
        key = repr(sorted(setting.items()))
        if key not in made:
            made[key] = plan_run(tool, model, **setting)
        return replace(made[key], memory=int(memory_gib * GIB))

    monkeypatch.setattr(fit, "plan_run", plan_once)
    frugal = {"separate_passes": True, "gradient_checkpointing": True, "target_rows": 1, "preserved_rows": 1}
    least = plan_once("eraser", tmp_path, 1, **SETTING, **frugal)
    assert least.worst_phase == "training"

    def found(size):
        return recommend_eraser_training(tmp_path, (size + RunPlan.reserve) / GIB, **SETTING)

    large = found(100 * least.peak)
    assert large.fits
    assert not large.setting["gradient_checkpointing"]
    assert large.setting["target_rows"] == 2
    assert not large.setting["separate_passes"]
    exactly = found(least.peak + 1)
    assert exactly.fits
    assert exactly.setting["separate_passes"]
    assert exactly.setting["num_frames"] == 17
    shorter = found(least.peak - 1)
    assert shorter.fits
    assert shorter.setting["num_frames"] == 9
    none = found(1000)
    assert not none.fits
    assert none.missing == none.peak + none.reserve - none.memory
    with pytest.raises(ValueError, match="`memory_gib` must be above the reserve 1.0, got 0.5"):
        recommend_eraser_training(tmp_path, 0.5, **SETTING)
