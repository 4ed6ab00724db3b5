"""The files of an evaluation's report: JSON that is read back, CSV, Markdown tables and a sheet of pictures."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from PIL import Image

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.core.text_files import read_json


ReportType = TypeVar("ReportType", bound="SavedReport")


class SavedReport:
    """A report whose figures are written to JSON and read back; pictures are not.

    A subclass is a dataclass with the field `rows` that names the saved fields in `saved`; the others
    have defaults. `pictures` names the field that its sheet shows, `csv_name` the file of its rows.
    """

    saved: ClassVar[tuple[str, ...]]
    pictures: ClassVar[str] = "kept"
    csv_name: ClassVar[str | None] = None

    def to_table(self) -> str:
        """The figures as Markdown tables."""
        raise TypeError(f"{type(self).__name__} must define `to_table`.")

    def _sheet(self) -> Image.Image:
        raise TypeError(f"{type(self).__name__} must define `_sheet`.")

    def to_json(self, path: str | os.PathLike) -> None:
        """Write everything but the pictures."""
        content = {name: getattr(self, name) for name in self.saved}
        write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")

    @classmethod
    def from_json(cls: type[ReportType], path: str | os.PathLike) -> ReportType:
        """Read what `to_json` wrote; raises `ValueError` for a file of something else."""
        content = read_json(path)
        if set(content) != set(cls.saved):
            raise ValueError(f"{path} must hold {list(cls.saved)}, got something else.")
        return cls(**content)

    def to_csv(self, path: str | os.PathLike) -> None:
        """Write one line per row."""
        write_rows(path, self.rows)

    def picture_sheet(self, path: str | os.PathLike) -> None:
        """Write a picture with the kept ones side by side; raises `ValueError` where there are none."""
        sheet = self._sheet()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)

    def _kept_pictures(self) -> list[Any]:
        kept = getattr(self, self.pictures)
        if not kept:
            raise ValueError(
                f"`{self.pictures}` must hold pictures to draw a sheet, got none. They are not saved "
                "with the report, and `sheet_prompts=0` keeps none."
            )
        return kept

    def save(self, folder: str | os.PathLike) -> None:
        """Write `report.json`, `table.md`, the rows as CSV, and of pictures that were kept `sheet.png`."""
        self.to_json(Path(folder, "report.json"))
        write_text(Path(folder, "table.md"), self.to_table())
        if self.csv_name is not None:
            self.to_csv(Path(folder, self.csv_name))
        if getattr(self, self.pictures):
            self.picture_sheet(Path(folder, "sheet.png"))


def markdown_table(table: Sequence[Sequence[str]], left: int = 1) -> str:
    """Cells as Markdown, the first row as heading; all columns after `left` ones are set right."""
    # A name may hold what would end a cell or a row.
    rows = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in table]
    rule = "|---" * left + "|---:" * (len(table[0]) - left) + "|"
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], rule, *lines[1:]])


def number_cell(
    value: float | None, interval: Sequence[float] | None = None, form: str = ".4g"
) -> str:
    """A number, with its interval in brackets; `-` for `None`."""
    if value is None:
        return "-"
    text = f"{value:{form}}"
    return text if interval is None else f"{text} [{interval[0]:{form}}, {interval[1]:{form}}]"


def spoken(name: str) -> str:
    """A name of code as words."""
    return name.replace("_", " ")


def write_rows(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys, at least one, as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: str | os.PathLike, content: str) -> None:
    """Write a file whole or not at all; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
