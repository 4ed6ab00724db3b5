from __future__ import annotations

import json

import pytest

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


def test_a_table_is_printed(folder, capsys):
    plan = run(folder, "--mixed_precision", "no", "--train_batch_size", "3")
    printed = capsys.readouterr().out
    assert "9 frames of 16x16, rank 8, 3 target and 3 preserved rows in one pass" in printed
    assert f"{plan.phases['training'] / 2**30:.2f} GiB" in printed
    assert "samples kept" in printed


def test_json_can_be_read_back(folder, capsys):
    plan = run(folder, "--json", "--memory_gib", "2")
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["peak"] == plan.peak
    assert found["setting"]["dtype"] == "bfloat16"


def test_too_small_a_card_is_told_by_how_much(folder, capsys):
    run(folder, "--memory_gib", "1.00001")
    assert "Nothing fits 1.00001 GiB" in capsys.readouterr().out


def test_bad_arguments(folder):
    with pytest.raises(ValueError, match="`train_batch_size` must be at least 1, got 0"):
        run(folder, "--train_batch_size", "0")
    with pytest.raises(ValueError, match="`memory_gib` must be positive"):
        run(folder, "--memory_gib", "-1")
