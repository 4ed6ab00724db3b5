"""The report of an evaluation: its files, and what a command says about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_ext.command_line.command import Outcome


if TYPE_CHECKING:
    from diffusers_ext.evaluation.forgetting_report import ForgettingReport
    from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
    from diffusers_ext.evaluation.report_files import SavedReport


def write_report(
    report: ForgettingReport | GoldenNoiseReport, folder: Path, *, has_pictures: bool
) -> None:
    """Write `report.json`, `table.md` and, of pictures that were kept, `sheet.png`."""
    from diffusers_ext.evaluation.report_files import write_text

    report.to_json(folder / "report.json")
    write_text(folder / "table.md", report.to_table())
    if has_pictures:
        report.picture_sheet(folder / "sheet.png")


def report_outcome(report: SavedReport, folder: Path, table: str) -> Outcome:
    """The figures, without one row for every picture, and where they were written.

    Args:
        report: of an evaluation.
        folder: with its files.
        table: for people.
    """
    facts = {name: getattr(report, name) for name in report.saved if name != "rows"}
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    files = sorted(path.relative_to(folder).as_posix() for path in paths)
    return Outcome({"output_dir": folder, "files": files, **facts}, f"{table}\nWrote {folder}")
