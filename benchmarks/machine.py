"""Where and when a figure was measured; heavy libraries are imported where they are needed, a table needs none."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS_DIR = Path(__file__).parent / "results"


def describe_machine() -> dict[str, Any]:
    """Device, cores, versions and date."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    return {
        "date": datetime.date.today().isoformat(),
        "device": gpu or f"{platform.machine()} CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in packages},
    }


def write_results(name: str, results: dict[str, Any], table: str) -> Path:
    """Write `<name>.json` and `<name>.md` into `benchmarks/results`; returns the JSON file's path."""
    from diffusers_ext.core.artifacts import write_atomically

    RESULTS_DIR.mkdir(exist_ok=True)
    machine = describe_machine()
    path = RESULTS_DIR / f"{name}.json"
    write_atomically(path, json.dumps({"machine": machine, **results}, indent=1) + "\n")
    where = f"{machine['device']}, {machine['cores']} cores, {machine['date']}"
    write_atomically(RESULTS_DIR / f"{name}.md", f"{table}\n\nMeasured on {where}.\n")
    return path


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
