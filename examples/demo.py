"""Run every tool on the bundled digits models and write one page of what each one did.

python examples/demo.py --output_dir outputs/demo
"""

from __future__ import annotations

import time

_BEGAN = time.perf_counter()  # before the imports below, which take most of the first seconds

import argparse
import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from examples.demo_processes import step_events
from examples.demo_report import DemoPart, DemoReport
from examples.demo_report_page import seconds_text, write_page

PARTS = ("new_glyph", "golden_noise", "eraser")


def use_one_thread() -> None:
    """Let torch use one thread, unless the environment says how many.

    The models are tiny: several threads mostly wait for each other, and on a machine that has anything else to do they
    wait many times as long as they compute.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def prepare() -> None:
    """Set this process up for steps: one thread, and no word of the libraries."""
    warnings.filterwarnings("ignore")
    use_one_thread()
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def load_parts(names: list[str], output_dir: Path) -> list[DemoPart]:
    """The parts by name, each with a folder of its own below `output_dir`."""
    from examples.demo_eraser import EraserDemo
    from examples.demo_golden_noise import GoldenNoiseDemo
    from examples.demo_new_glyph import NewGlyphDemo

    parts = dict(zip(PARTS, (NewGlyphDemo, GoldenNoiseDemo, EraserDemo), strict=True))
    return [parts[name](output_dir / name) for name in names]


def machine_facts(processes: int) -> dict[str, str]:
    """Device, processes and their threads, date and versions, for readers."""
    from benchmarks.machine import describe_machine

    machine = describe_machine()
    return {
        "Machine": f"{machine['device']}, {machine['cores']} cores; processes: {processes}, torch "
        f"threads of each: {machine['threads']}",
        "Date": machine["date"],
        **machine["versions"],
    }


def main(input_args: list[str] | None = None) -> None:
    """Run all parts, write the page again after each step, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--processes",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="steps that do not need each other run side by side; the same results from any number",
    )
    args = parser.parse_args(input_args)
    page = args.output_dir / "report.html"
    page.unlink(missing_ok=True)  # of an earlier demo
    print(f"The report, which grows step by step once torch is imported: {page.resolve().as_uri()}", flush=True)
    # Torch and the tools are imported only now, so that the line above comes at once.
    prepare()
    parts = load_parts(args.parts, args.output_dir)
    report = DemoReport(parts, facts=machine_facts(args.processes), began=_BEGAN)
    events = step_events(parts, args.processes, prepare) if args.processes > 1 else None
    report.run(partial(write_page, path=page), partial(print, flush=True), events)
    print_tables(report)
    print(f"\nAll in {seconds_text(report.total)}: {page.resolve().as_uri()}")


def print_tables(report: DemoReport) -> None:
    """Print each part's tables in Markdown."""
    from benchmarks.machine import table

    for section in report.sections:
        print(f"\n## {section.part.title} ({seconds_text(sum(section.seconds.values()))})")
        for found in section.tables:
            print(f"\n{found.title}\n\n{table(list(found.header), [list(r) for r in found.rows])}")


if __name__ == "__main__":
    main()
