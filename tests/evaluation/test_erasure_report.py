from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.evaluation.erasure_report import ErasureReport, summarize_group
from diffusers_ext.evaluation.paired_comparison import wilson_interval
from diffusers_ext.evaluation.report_files import KeptClip
from tests.evaluation.drawn_erasure import rows_of

SETTINGS = {"scales": {"erased": 1.0}, "concept_aspect": "digit"}


@pytest.fixture
def report() -> ErasureReport:
    rows = rows_of("target", 20, lambda i: {"digit": i < 1, "reads_as": "one", "motion": 0.25})
    rows += rows_of("held_out_template", 4, lambda i: {"digit": False})
    rows += rows_of("preserved", 20, lambda i: {"digit": i > 0, "color": i > 1, "drift": 0.125})
    ramp = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    kept = KeptClip("target", "a red | seven", 1, {"base": ramp, "erased": ramp}, {})
    return ErasureReport.from_rows(SETTINGS, rows, [kept])


def test_rates_by_group(report):
    assert list(report.groups) == ["target", "held_out_template", "preserved", "all"]
    assert report.rate("target") == 0.05
    assert report.rate("target", side="base") == 1.0
    assert report.rate("preserved", "color", "erased") == 0.9
    assert report.rate("all", "color") == pytest.approx(42 / 44)
    assert report.groups["all"]["clips"] == 44


def test_all_groups_together_say_nothing_about_the_concept(report):
    assert list(report.groups["all"]["rates"]["erased"]) == ["color"]
    single = ErasureReport.from_rows(SETTINGS, rows_of("target", 3))
    assert list(single.groups) == ["target"]


def test_tables(report):
    rates, figures, readings = report.to_table().strip().split("\n\n")
    assert rates.splitlines()[0] == "| group | seen | clips | base | erased | difference |"
    assert "| target | digit (the concept) | 20 | 1.000 [0.839, 1.000] | 0.050 [" in rates
    assert "| held out template | digit (the concept) | 4 |" in rates
    assert "| target | motion | 20 | 0.500 | 0.250 | 0.500 [0.500, 0.500] |" in figures
    assert "| preserved | drift | 20 | - | 0.125 [0.125, 0.125] | - |" in figures
    assert "| target | seven 100.0% | one 100.0% |" in readings
    columns = [line.count("|") for line in rates.splitlines()]
    assert len(set(columns)) == 1


def test_several_scales_stand_side_by_side():
    rows = [
        {**row, **{f"scale 2/{key[7:]}": x for key, x in row.items() if key.startswith("erased/")}}
        for row in rows_of("target", 3, lambda i: {"degenerate": "noise"})
    ]
    settings = {**SETTINGS, "scales": {"erased": 1.0, "scale 2": 2.0}}
    report = ErasureReport.from_rows(settings, rows)
    rates, figures, _, degenerate = report.to_table().strip().split("\n\n")
    assert "| erased | erased: difference | scale 2 | scale 2: difference |" in rates
    assert "| erased | erased: ratio | scale 2 | scale 2: ratio |" in figures
    assert "| target | scale 2 | 0 | 0 | 3 | - |" in degenerate
    assert report.rate("target", side="scale 2") == 1.0


def test_rare_readings_are_summed_up():
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    rows = rows_of("target", 16, lambda i: {"reads_as": words[max(0, i - 8)]})
    table = ErasureReport.from_rows(SETTINGS, rows).to_table()
    assert "one 56.2%, two 6.2%, three 6.2%, four 6.2%, others 25.0% |" in table


def test_files(report, tmp_path):
    report.save(tmp_path / "new", fps=4)
    found = {p.relative_to(tmp_path / "new").as_posix() for p in (tmp_path / "new").rglob("*.*")}
    clips = {f"clips/target_00_a-red-seven_{side}.gif" for side in ("base", "erased")}
    assert found == {"report.json", "clips.csv", "table.md", "sheet.png", *clips}
    assert ErasureReport.from_json(tmp_path / "new" / "report.json") == report
    assert (tmp_path / "new" / "table.md").read_text() == report.to_table()
    with open(tmp_path / "new" / "clips.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert len(lines) == 44
    assert lines[1]["erased/digit"] == "False"
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.height > 2 * 96


def test_a_report_without_clips_writes_none(report, tmp_path):
    report.kept.clear()
    report.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "clips.csv", "table.md"}
    with pytest.raises(ValueError, match="got none. Clips are not saved"):
        report.picture_sheet(tmp_path / "sheet.png")


def test_another_file_is_refused(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="must hold .*settings.*, got something else"):
        ErasureReport.from_json(tmp_path / "report.json")


def test_rates_figures_and_readings():
    rows = rows_of("target", 40, lambda i: {"digit": i < 4, "motion": 0.4, "drift": i / 40,
                                             "reads_as": "seven" if i < 4 else "one"})  # fmt: skip
    found = summarize_group(rows, ["erased"])
    rate = found["rates"]["erased"]["digit"]
    assert (rate["base"], rate["other"]) == (1.0, 0.1)
    assert rate["difference"] == pytest.approx(-0.9)
    assert rate["other_interval"] == list(wilson_interval(0.1, 40))
    assert found["rates"]["erased"]["color"]["difference"] == 0
    motion = found["figures"]["erased"]["motion"]
    assert motion["ratio"] == pytest.approx(0.8)
    assert motion["ratio_interval"] == pytest.approx([0.8, 0.8])
    assert motion["difference"] == pytest.approx(-0.1)
    drift = found["figures"]["erased"]["drift"]
    assert drift["other"] == pytest.approx(19.5 / 40)
    assert drift["other_interval"][0] < drift["other"] < drift["other_interval"][1]
    assert found["readings"]["reads_as"] == {"base": {"seven": 1.0}, "erased": {"one": 0.9, "seven": 0.1}}
    assert (found["clips"], found["prompts"], found["left_out"]) == (40, 40, 0)


def test_clips_of_few_prompts_are_resampled_one_by_one():
    rows = rows_of("target", 40, lambda i: {"digit": i < 4}, prompts=2)
    rate = summarize_group(rows, ["erased"])["rates"]["erased"]["digit"]
    assert rate["other_interval"] == list(wilson_interval(0.1, 40))
    alike = rows_of("target", 40, lambda i: {"digit": i % 20 < 2}, prompts=20)
    rate = summarize_group(alike, ["erased"])["rates"]["erased"]["digit"]
    assert rate["other_interval"] == list(wilson_interval(0.1, 20))


def test_masked_verdicts_are_left_out():
    def half(index: int) -> dict[str, bool | None]:
        return {"digit": True if index % 2 else None, "color": None}

    found = summarize_group(rows_of("anchor", 10, half, half), ["erased"])
    assert found["rates"]["erased"]["digit"]["pairs"] == 5
    assert "color" not in found["rates"]["erased"]


def test_blank_clips_of_the_base_say_nothing():
    def base(index: int) -> dict[str, str | bool]:
        return {"degenerate": "blank", "digit": False} if index < 3 else {"degenerate": "frozen"}

    rows = rows_of("target", 10, lambda i: {"degenerate": "blank"} if i > 7 else {}, base)
    found = summarize_group(rows, ["erased"])
    assert (found["clips"], found["left_out"]) == (7, 3)
    assert found["rates"]["erased"]["digit"]["base"] == 1.0
    assert found["degenerate"] == {
        "base": {"blank": 3, "frozen": 7, "noise": 0},
        "erased": {"blank": 2, "frozen": 0, "noise": 0},
    }
    with pytest.raises(ValueError, match="got blank ones only for the 3 of group 'target'"):
        summarize_group(rows[:3], ["erased"])


def test_no_ratio_to_nothing():
    rows = rows_of("target", 3, base=lambda i: {"motion": float(i)})
    motion = summarize_group(rows, ["erased"])["figures"]["erased"]["motion"]
    assert "ratio" not in motion
    assert motion["difference"] == pytest.approx(-0.5)
