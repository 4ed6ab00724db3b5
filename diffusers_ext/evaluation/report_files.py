"""The files of an evaluation's report: JSON that is read back, CSV and Markdown for people."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.core.text_files import read_json


ReportType = TypeVar("ReportType", bound="SavedReport")


class SavedReport:
    """A report whose figures are written to JSON and read back; pictures are not.

    A subclass is a dataclass that names the saved fields in `saved`; the others have defaults.
    """

    saved: ClassVar[tuple[str, ...]]

    def to_json(self, path: str | os.PathLike) -> None:
        """Write everything but the pictures."""
        content = {name: getattr(self, name) for name in self.saved}
        write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")

    @classmethod
    def from_json(cls: type[ReportType], path: str | os.PathLike) -> ReportType:
        """Read what `to_json` wrote; the report has no pictures.

        Raises:
            ValueError: the file is of something else.
        """
        content = read_json(path)
        if set(content) != set(cls.saved):
            raise ValueError(f"{path} must hold {list(cls.saved)}, got something else.")
        return cls(**content)


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
