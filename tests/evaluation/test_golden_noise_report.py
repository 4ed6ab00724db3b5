from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.evaluation.forgetting import ForgettingReport
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from tests.evaluation.conftest import make_pipeline
from tests.evaluation.golden_subjects import PROMPTS, Redness, evaluate, moved, unmoved
from tests.training.stub_rewards import Brightness


@pytest.fixture(scope="module")
def report() -> GoldenNoiseReport:
    return evaluate(
        make_pipeline(),
        refine={"far": moved, "near": unmoved},
        rewards=[Brightness(), Redness()],
        num_images_per_prompt=3,
        best_of=2,
        sheet_prompts=2,
        batch_size=9,
    )


def test_json_keeps_everything_but_the_pictures(report, tmp_path):
    report.to_json(tmp_path / "new" / "report.json")
    loaded = GoldenNoiseReport.from_json(tmp_path / "new" / "report.json")
    assert loaded == report
    assert loaded.to_table() == report.to_table()
    assert loaded.kept == []
    with pytest.raises(ValueError, match="`kept` must hold pictures to draw a sheet, got none"):
        loaded.picture_sheet(tmp_path / "sheet.png")


def test_another_file_is_refused(tmp_path):
    ForgettingReport({}, 0.0, [], {}).to_json(tmp_path / "report.json")
    with pytest.raises(ValueError, match=r"must hold \['settings', 'scores', .*something else"):
        GoldenNoiseReport.from_json(tmp_path / "report.json")


def test_csv_has_one_row_per_picture(report, tmp_path):
    report.to_csv(tmp_path / "pictures.csv")
    with open(tmp_path / "pictures.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert [int(row["seed"]) for row in rows] == [row["seed"] for row in report.rows]
    for name in ("far/redness 3", "best of 2/brightness 1", "near/noise_kurtosis"):
        assert [float(row[name]) for row in rows] == [row[name] for row in report.rows]


def test_the_table_says_all_of_it(report):
    tables = [table.splitlines() for table in report.to_table().split("\n\n")]
    heads = [table[0].split(" | ")[0] for table in tables]
    assert heads == ["| brightness 1", "| redness 3", "| against best of 2", "| noise",
                     "| diversity over seeds", "| cost"]  # fmt: skip
    sides = [line.split(" | ")[0].removeprefix("| ") for line in tables[0][2:]]
    assert sides == ["standard", "far", "near", "best of 2"]
    assert tables[0][4].endswith("| 0 [0, 0] | 0.5 [0.2265, 0.7735] | 9 |")
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    assert f"{report.scores['far']['redness 3']['mean_other']:.4g}" in tables[1][3]


def test_the_sheet_shows_two_seeds_of_the_first_prompts(report, tmp_path):
    assert [(kept.prompt, len(kept.pictures)) for kept in report.kept] == [
        (prompt, 3) for prompt in PROMPTS[:2] for _ in range(2)
    ]
    assert report.kept[1].seed == report.rows[1]["seed"]
    assert report.kept[1].scores["far"] == report.rows[1]["far/brightness 1"]
    report.picture_sheet(tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    # 32 pixels are shown as 96, with gaps; a label stands before the two times three pictures.
    assert sheet.shape[1] == 260 + 6 + 6 * (96 + 6) + 2 * 6
    first = np.asarray(report.kept[0].pictures["far"].resize((96, 96), Image.Resampling.NEAREST))
    left = 260 + 6 + 96 + 6
    assert np.array_equal(sheet[28 : 28 + 96, left : left + 96], first)


def test_what_was_left_out_is_not_in_the_table():
    report = evaluate(make_pipeline(), num_images_per_prompt=1)
    table = report.to_table()
    assert "best of" not in table
    assert "diversity" not in table
    assert (report.best_of, report.diversity) == ({}, {})
