from __future__ import annotations

import json

import pytest

from diffusers_ext.planning import plan_run
from tests.tiny_cogvideox import tiny_video_pipeline
from training.plan_eraser import main, parse_args


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_video_pipeline().save_pretrained(path)
    return path


def run(folder, *flags):
    command = ["--pretrained_model_name_or_path", str(folder), "--eraser_rank", "8", *flags]
    return main(parse_args(command))


def test_the_plan_is_that_of_the_library(folder, capsys):
    flags = ("--mixed_precision", "no", "--train_batch_size", "3", "--exact", "--validation")
    plan = run(folder, *flags, "--localization_weight", "0.5")
    assert capsys.readouterr().out == plan.table() + "\n"
    setting = {"rank": 8, "target_rows": 3, "preserved_rows": 3, "localization": True}
    setting |= {"mixed_precision": "no", "validation": True, "gradient_checkpointing": False}
    assert plan == plan_run("eraser", folder, exact=True, **setting)


def test_json_can_be_read_back(folder, capsys):
    plan = run(folder, "--json", "--memory_gib", "2")
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["peak"] == plan.peak
    assert found["setting"]["mixed_precision"] == "bf16"


def test_no_points_are_all_of_a_trajectory(folder, capsys):
    found = [run(folder, "--points_per_trajectory", points).disk for points in ("0", "50")]
    assert found[0] == found[1]


def test_too_small_a_gpu_is_told_by_how_much(folder, capsys):
    run(folder, "--memory_gib", "1.00001")
    assert "Does not fit: peak" in capsys.readouterr().out


def test_bad_arguments(folder):
    with pytest.raises(ValueError, match="`train_batch_size` must be at least 1, got 0"):
        run(folder, "--train_batch_size", "0")
    with pytest.raises(ValueError, match="`memory_gib` must be positive"):
        run(folder, "--memory_gib", "-1")
