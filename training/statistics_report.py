"""What a collection leaves: the statistics, a table, plots and, on request, more forms of them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.nullspace.plots import plot_null_dimensions, plot_spectrum
from diffusers_ext.nullspace.projector import null_dimensions
from diffusers_ext.nullspace.settings import CollectionSettings
from diffusers_ext.nullspace.statistics import FeatureStatistics


logger = get_logger(__name__)

DEFAULT_THRESHOLD = 2e-2


def has_matplotlib() -> bool:
    """Whether plots can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def report_rows(statistics: FeatureStatistics, threshold: float) -> list[dict[str, Any]]:
    """`FeatureStatistics.report`, and how many eigenvalues of each matrix are below `threshold`."""
    rows = statistics.report()
    for row in rows:
        values = statistics.spectrum(row["matrix"]).values
        row["null_dims"] = null_dimensions(values, threshold=threshold)
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of equal keys as a text table with aligned columns."""
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(line[1:], widths[1:]))]
        )
        for line in lines
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_statistics(
    args: CollectionSettings, statistics: FeatureStatistics, facts: dict[str, Any], folder: Path
) -> None:
    """Write the artifact, `report.json` and the plots into `folder`."""
    threshold = args.nullspace_threshold or DEFAULT_THRESHOLD
    rows = report_rows(statistics, threshold)
    logger.info(f"Statistics (null_dims: eigenvalues below {threshold:g})\n{format_table(rows)}")
    full = [row["matrix"] for row in rows if not row["null_dims"]]
    if full and args.nullspace_threshold is not None:
        logger.warning(
            f"No eigenvalue is below `nullspace_threshold` {threshold:g} in {len(full)} of "
            f"{len(rows)} matrices, the first is {full[0]}. `--directions null` would refuse it; "
            "the default directions need no threshold."
        )
    statistics.save_pretrained(folder)
    report = {**facts, "nullspace_threshold": threshold, "matrices": rows}
    write_atomically(folder / "report.json", json.dumps(report, indent=2) + "\n")
    if has_matplotlib():
        plot_spectrum(statistics, folder / "plots" / "spectrum.png")
        plot_null_dimensions(statistics, folder / "plots" / "null_dimensions.png")
    else:
        logger.info("No plots: they need matplotlib, `pip install diffusers_ext[plots]`.")
