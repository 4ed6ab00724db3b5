from __future__ import annotations

import json

import pytest
from PIL import Image

from diffusers_ext.evaluation.forgetting import ForgettingReport, summarize
from diffusers_ext.evaluation.paired_figures import KeptPair


ROWS = [
    {"group": "preserved", "prompt": "a |\nb", "images": 2, "pixel_drift": 0.25},
    {"group": "preserved", "prompt": "long_name", "images": 2, "pixel_drift": 0.75},
    {"group": "subject", "prompt": "sks", "images": 2, "pixel_drift": 0.5, "accuracy_base": 1 / 3},
]


def make_report(**changes) -> ForgettingReport:
    summary = {"preserved": summarize(ROWS[:2]), "subject": summarize(ROWS[2:])}
    distribution = {"preserved": {"mmd": {"tuned": 0.5, "floor": -0.125}}}
    return ForgettingReport({"seed": 0}, 0.0, ROWS, summary, distribution, **changes)


def test_a_summary_holds_means_counts_and_the_worst_prompt():
    found = summarize(ROWS[:2])
    assert found == {"prompts": 2, "images": 4, "pixel_drift": 0.5, "worst_pixel_drift": 0.75}


def test_json_gives_the_same_report_back(tmp_path):
    report = make_report(pairs=[KeptPair("subject", "sks", *[Image.new("RGB", (4, 4))] * 2)])
    report.to_json(tmp_path / "new" / "report.json")
    read = ForgettingReport.from_json(tmp_path / "new" / "report.json")
    assert read == report
    assert read.pairs == []
    assert json.loads((tmp_path / "new" / "report.json").read_text())["drift_floor"] == 0


def test_a_figure_that_is_not_finite_is_not_written(tmp_path):
    report = make_report()
    report.drift_floor = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.to_json(tmp_path / "report.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", r"report\.json must hold"), ("{}", "must hold .*'drift_floor'.* got something else")],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ForgettingReport.from_json(tmp_path / "report.json")


def test_tables_are_markdown():
    lines = make_report().to_table().splitlines()
    assert lines[:2] == [
        "| group | prompts | images | pixel drift | worst pixel drift | accuracy base |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    assert lines[2] == "| preserved | 2 | 4 | 0.5 | 0.75 | - |"
    assert lines[3] == "| subject | 1 | 2 | 0.5 | 0.5 | 0.3333 |"
    assert "| preserved | mmd | 0.5 | -0.125 |" in lines
    assert "| preserved | a \\| b | 2 | 0.25 | - |" in lines
    assert "| preserved | long_name | 2 | 0.75 | - |" in lines
    short = make_report().to_table(per_prompt=False)
    assert "sks" not in short
    assert "pixel drift 0." in short


def test_the_sheet_has_a_row_per_prompt(tmp_path):
    red, blue = (Image.new("RGB", (32, 32), color) for color in ("#c80000", "#0000c8"))
    pairs = [KeptPair("preserved", row["prompt"], red, blue) for row in ROWS[:2] for _ in range(2)]
    make_report(pairs=pairs).picture_sheet(tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        colors = {color: number for number, color in sheet.getcolors(2**16)}
    assert colors[200, 0, 0] == colors[0, 0, 200] == 4 * 96 * 96


def test_a_report_without_pictures_draws_no_sheet(tmp_path):
    with pytest.raises(ValueError, match="`pairs` must hold pictures to draw a sheet, got none"):
        make_report().picture_sheet(tmp_path / "sheet.png")
