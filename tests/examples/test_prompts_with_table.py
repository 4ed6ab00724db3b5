"""A batch of prompts ends in pictures, scores and a table."""

from __future__ import annotations

import csv

import numpy as np

from examples.prompts_with_table import main
from tests.evaluation.golden_subjects import small_network
from tests.examples.picture_files import read_frames
from tests.tiny_digits import random_digits_pipeline


def test_pictures_scores_and_table(tmp_path, capsys):
    random_digits_pipeline().save_pretrained(tmp_path / "model")
    small_network().save_pretrained(tmp_path / "network")
    (tmp_path / "prompts.txt").write_text("a red seven\na blue one\na green two\n")
    main(
        ["--model", str(tmp_path / "model"), "--noise_model", str(tmp_path / "network"),
         "--prompt_file", str(tmp_path / "prompts.txt"), "--num_inference_steps", "2",
         "--reward", "tests.training.stub_rewards:Brightness", "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == ["a red seven", "a blue one", "a green two"]
    for row in rows:
        for side in ("random", "golden"):
            [picture] = read_frames(tmp_path / "out" / f"{int(row['seed']):04d}_{side}.png")
            assert np.float32(picture.mean()) == np.float32(row[side])
    table = (tmp_path / "out" / "table.md").read_text()
    means = [np.mean([float(row[side]) for row in rows]) for side in ("random", "golden")]
    wins = np.mean([float(row["golden"]) > float(row["random"]) for row in rows])
    assert "| mean | {:.4f} | {:.4f} | ".format(*means) in table
    assert f"| wins | | {wins:.2f} | " in table
    assert table in capsys.readouterr().out
