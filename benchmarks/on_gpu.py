"""What the three tools cost on a GPU, at the published sizes with random weights: at most 8 minutes on an H100.

python benchmarks/on_gpu.py
python benchmarks/on_gpu.py --only train_5b calls  # the other parts stay as they were
python benchmarks/on_gpu.py --budget  # what each part takes by its operations; needs no GPU
python benchmarks/on_gpu.py --toy  # a rehearsal with tiny models, without a GPU

Nothing is downloaded. Each part is a process with a time limit of its own; what is found is written after every part,
and when the command is interrupted, after which `--only` goes on. What an earlier run has found of a part stays until
that part is whole again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # before the profiler is loaded
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.gpu.workers import DONE, INTERRUPTED, Outcome, Part, work_through
from benchmarks.machine import table

RESULTS = Path(__file__).parent / "results"
# The most important ones first: where time runs out, the last ones are left.
PARTS = (
    Part("train_5b", "Eraser of CogVideoX-5b: training at 49 x 480 x 720", "eraser_training:train_cogvideox_5b", 150),
    Part("train_2b", "Eraser of CogVideoX-2b: training at 49 x 480 x 720", "eraser_training:train_cogvideox_2b", 75),
    Part("train_wan", "Eraser of Wan 2.1 1.3B: training at 49 x 480 x 720", "eraser_training:train_wan", 75),
    Part("null_space", "Null-space DreamBooth: training steps", "null_space:training_steps", 60),
    Part("statistics", "Feature statistics", "null_space:statistics", 60),
    Part("edits", "Edits in closed form", "null_space:edits", 60),
    Part("golden_noise", "Golden noise", "golden_noise:networks_and_runs", 45),
    Part("calls", "Erasers in inference at 49 x 480 x 720", "eraser_inference:calls", 90),
    Part("offload", "Erasers with CPU offload", "eraser_inference:offloaded", 60),
    Part("compile", "Erasers under torch.compile", "eraser_inference:compiled", 120),
)  # fmt: skip
TOTAL = 470  # seconds; with starting and writing less than 8 minutes
PATIENCE = 4  # times as long in a rehearsal, on a CPU that does other things, too


def run_part(name: str, toy: bool, tell: Callable[[dict[str, Any]], None], wait: Callable[[], object]) -> None:
    """Do one part in this process: import, `wait`, tell device and date, then every row as it is found."""
    part = next(one for one in PARTS if one.name == name)
    module, _, function = part.function.partition(":")
    work = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    from benchmarks.gpu.device import Place, device_facts, this_device

    wait()
    tell({"machine": device_facts()})
    work(Place(this_device(), toy, tell))


def refuse_without_gpu() -> None:
    """End the process with a message where no GPU is there."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("A GPU must be there, got none. `--toy` rehearses on a CPU, `--budget` needs none.")


def work_on(name: str, toy: bool, rows: Path) -> None:
    """What the process of a part does; its first line of input lets it begin."""
    with rows.open("a", encoding="utf-8") as file:

        def tell(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        run_part(name, toy, tell, _begin)


def _begin() -> None:
    if not sys.stdin.readline():
        raise SystemExit("Whoever started this part is gone.")


def read_results(path: Path) -> dict[str, Any]:
    """What was found before, by part."""
    return json.loads(path.read_text(encoding="utf-8"))["parts"] if path.is_file() else {}


def result_of(part: Part, outcome: Outcome, toy: bool) -> dict[str, Any]:
    """One part as it is kept."""
    return {
        "title": part.title,
        "status": outcome.status,
        "rehearsal": toy,
        "seconds": round(outcome.seconds, 1),
        "limit": part.limit,
        "machine": outcome.facts,
        "rows": outcome.figures,
    }


def number(value: float, unit: str) -> str:
    """A figure with its unit, to three digits; a count in full."""
    if unit == "s" and value < 1:
        return f"{1000 * value:.3g} ms"
    if unit == "GiB" and value < 0.1:
        return f"{1024 * value:.3g} MiB"
    return f"{value:.3g} {unit}" if unit else f"{value:,}"


def row_cells(row: dict[str, Any]) -> list[str]:
    """What, measured, beside what, ratio with its range."""
    if "measured" not in row:
        return [row["what"], row["note"], "", ""]
    unit = row["unit"]
    beside = f"{number(row['beside'], unit)} ({row['of']})" if "beside" in row else row.get("note", "")
    ratio = f"{row['ratio']:.3g}" if "ratio" in row else ""
    if "range" in row:
        ratio += " ({:.3g} to {:.3g})".format(*row["range"])
    return [row["what"], number(row["measured"], unit), beside, ratio]


def results_text(results: dict[str, Any]) -> str:
    """All parts as Markdown, in order."""
    blocks = []
    if any(part["rehearsal"] for part in results.values()):
        blocks.append("**A rehearsal with tiny models: times and sizes mean nothing.**")
    for name in [part.name for part in PARTS if part.name in results]:
        found = results[name]
        machine, text = found["machine"], [f"## {found['title']}"]
        if found["rows"]:
            rows = [row_cells(row) for row in found["rows"]]
            text.append(table(["what", "measured", "beside", "ratio (range)"], rows))
        text.append(f"`--only {name}`: {found['status']}, {found['seconds']:.0f} s{place_text(machine)}.")
        blocks.append("\n\n".join(text))
    return "\n\n".join(blocks) + "\n"


def place_text(machine: dict[str, Any]) -> str:
    """Device, versions and date; empty of a part that has not come to telling them."""
    if not machine:
        return ""
    versions = [f"{name} {version}" for name, version in machine["versions"].items()]
    if machine.get("cuda"):
        versions.insert(1, f"CUDA {machine['cuda']}")
    return f", {machine['device']}, {', '.join(versions)}, {machine['date']}"


def write_results(folder: Path, name: str, results: dict[str, Any]) -> None:
    """`<name>.json` and `<name>.md`, each the old one or the whole new one; no heavy library is waited for."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {f"{name}.json": json.dumps({"parts": results}, indent=1) + "\n", f"{name}.md": results_text(results)}
    for file, text in texts.items():
        partial = folder / f".{file}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / file)


def part_command(part: Part, rows: Path, toy: bool) -> list[str]:
    """The command line of the process of a part."""
    return [sys.executable, __file__, "--part", part.name, "--rows", str(rows), *(["--toy"] if toy else [])]


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Within the block, to be asked to end is what ctrl-C is: `KeyboardInterrupt`."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def measure(names: Sequence[str], toy: bool, output_dir: Path, total: float) -> dict[str, str]:
    """Do the parts of these names and write what is known after each; returns how each of them ended."""
    name, began = "on_gpu_rehearsal" if toy else "on_gpu", time.monotonic()
    results, ended = read_results(output_dir / f"{name}.json"), {}
    patience = PATIENCE if toy else 1
    chosen = [part._replace(limit=patience * part.limit) for part in PARTS if part.name in names]
    with tempfile.TemporaryDirectory() as folder, interrupted_by_sigterm(), ExitStack() as stack:
        ahead = (os.cpu_count() or 1) > 2
        done = work_through(chosen, lambda p, rows: part_command(p, rows, toy), Path(folder), patience * total, ahead)
        for part, outcome in stack.enter_context(closing(done)):
            ended[part.name] = outcome.status
            print(f"{part.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
            if outcome.status != DONE and results.get(part.name, {}).get("status") == DONE:
                print(f"{part.name}: what an earlier run has found stays", flush=True)
            else:
                results[part.name] = result_of(part, outcome, toy)
                write_results(output_dir, name, results)
            if outcome.status == INTERRUPTED:
                print(f"{output_dir / name}.md has what was measured till then", flush=True)
    print(f"{output_dir / name}.md after {time.monotonic() - began:.0f} s")
    return ended


def main(input_args: list[str] | None = None) -> int:
    """Measure, or print the budget; returns 1 where a part that was asked for is not whole, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--toy", action="store_true", help="tiny models, for a rehearsal; also without a GPU")
    parser.add_argument("--budget", action="store_true", help="print what the parts take by their operations")
    parser.add_argument("--output_dir", type=Path, help="benchmarks/results; outputs of a rehearsal without it")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for all parts")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args, began = parser.parse_args(input_args), time.monotonic()
    if args.part:
        work_on(args.part, args.toy, args.rows)
        return 0
    if args.budget:
        from benchmarks.gpu.budget import budget_text

        print(budget_text([part for part in PARTS if part.name in args.only]))
        return 0
    if not args.toy:
        refuse_without_gpu()
    folder = args.output_dir or (Path("outputs") if args.toy else RESULTS)
    try:
        # The first import of torch, by which a GPU is found, is in it.
        ended = measure(args.only, args.toy, folder, args.total - (time.monotonic() - began))
    except KeyboardInterrupt:
        return 130
    return int(any(status != DONE for status in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
