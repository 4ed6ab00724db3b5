"""How well plans agree with runs: memory, disk and time of short runs on the bundled models.

taskset -c 0 python benchmarks/cost_of_plans.py
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table, write_results
from benchmarks.measured_memory import peak_bytes
from benchmarks.planned_runs import IN_MEMORY, RUNS, PlannedRun
from diffusers_ext.planning import RunPlan, plan_run

MIB, KIB = 2**20, 2**10
LIMIT = 0.15
MEMORY_STEPS = {"steps": 2, "sampling_steps": 4}
# Enough for the first step, which is slower, not to matter.
TIMED_STEPS = {"steps": 60, "sampling_steps": 20}


def memory_and_disk(run: PlannedRun) -> list[dict[str, Any]]:
    """Peaks of the whole scripts and the bytes they leave, beside the plan's."""
    plan = plan_run(run.tool, run.model, gpu="here", **run.setting)
    measured = max(peak_bytes(script) for script in run.scripts.values())
    disk = plan.disk_total - plan.disk.get(IN_MEMORY, 0)
    rows = [("peak memory", plan.peak, measured), ("files", disk, run.written)]
    return [_row(run.tool, what, *sizes) for what, *sizes in rows]


def times(make: Any, pairs: int) -> list[dict[str, Any]]:
    """Seconds of phases in the reports of runs, each beside those of a plan made just before it."""
    found: dict[str, list[tuple[float, float]]] = {}
    tool = ""
    for _ in range(pairs):
        with tempfile.TemporaryDirectory() as folder:
            run = make(Path(folder, "run"), saves=False, **TIMED_STEPS)
            tool, plan = run.tool, plan_run(run.tool, run.model, gpu="here", **run.setting)
            for script in run.scripts.values():
                script()
            for name, seconds in reported_seconds(run).items():
                found.setdefault(name, []).append((planned_seconds(plan, name), seconds))
    return [_timed_row(tool, name, measured) for name, measured in found.items()]


def reported_seconds(run: PlannedRun) -> dict[str, float]:
    """What the reports of a run say, by the phases that each covers."""
    found = {}
    for folder in run.kept:
        report, training = folder / "report.json", folder / "training_report.json"
        if training.is_file():
            found["training, validation"] = json.loads(training.read_text())["seconds"]
        elif report.is_file():
            found["re-denoising"] = json.loads(report.read_text())["this_run"]["seconds"]
    return found


def planned_seconds(plan: RunPlan, names: str) -> float:
    """Of the phases that are named, those of them that there are."""
    return sum(phase.seconds for phase in plan.phases if phase.name in names.split(", "))


def _row(tool: str, what: str, planned: float, measured: float) -> dict[str, Any]:
    row = {"tool": tool, "what": what, "planned": planned, "measured": measured}
    return row | {"ratio": planned / measured}


def _timed_row(tool: str, name: str, found: list[tuple[float, float]]) -> dict[str, Any]:
    """The pair of the median ratio; of an even number the lower one."""
    ordered = sorted(found, key=lambda pair: pair[0] / pair[1])
    row = _row(tool, f"time of {name}", *ordered[(len(ordered) - 1) // 2])
    lowest, *_, highest = [planned / measured for planned, measured in (ordered[0], *ordered)]
    return row | {"lowest": lowest, "highest": highest}


def text_of(row: dict[str, Any], name: str) -> str:
    """A size or a time of a row, with its unit."""
    value = row[name]
    if row["what"].startswith("time"):
        return f"{value:.2f} s"
    return f"{value / MIB:.2f} MiB" if value >= MIB else f"{value / KIB:.0f} KiB"


def main(input_args: list[str] | None = None) -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="of a plan and a run, for times")
    args = parser.parse_args(input_args)
    torch.set_num_threads(1)
    rows = []
    for make in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            rows += memory_and_disk(make(Path(folder, "run"), **MEMORY_STEPS))
        rows += times(make, args.pairs)
    lines = [
        [r["tool"], r["what"], text_of(r, "planned"), text_of(r, "measured"), f"{r['ratio']:.3f}"]
        + [f"{r['lowest']:.3f} to {r['highest']:.3f}" if "lowest" in r else "-"]
        for r in rows
    ]
    header = ["tool", "what", "plan", "run", "plan / run (limit 1 +- 0.15)", "range over pairs"]
    text = table(header, lines)
    results = {"limit": LIMIT, "pairs": args.pairs, "memory_steps": MEMORY_STEPS}
    write_results("cost_of_plans", {**results, "timed_steps": TIMED_STEPS, "rows": rows}, text)
    print(text)


if __name__ == "__main__":
    main()
