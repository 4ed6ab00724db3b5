"""`diffusers-ext demo`: all three tools on the small models that come with the package."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from diffusers_ext.command_line.options import DONE, FAILED, Command, Outcome

PARTS = ("new_glyph", "golden_noise", "eraser")
PAGE = "report.html"
_PACKAGE = Path(__file__).parents[1]
# In a wheel, in a checkout.
_PLACES = (_PACKAGE / "demo_files", _PACKAGE.parent)


def demo_script() -> Path:
    """`examples/demo.py` of this installation; `ValueError` where it came without."""
    for place in _PLACES:
        script = place / "examples" / "demo.py"
        if script.is_file():
            return script
    raise ValueError(
        f"`demo` must find its script in {_PLACES[0]}, got an installation without it: install the wheel."
    )


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", default="outputs/demo", help="gets report.html, which grows")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="tools to show")
    parser.add_argument("--processes", type=int, help="that work side by side; two, or one on a single core")


def _run_demo(args: argparse.Namespace) -> Outcome:
    script = demo_script()
    if args.processes is not None and args.processes < 1:
        raise ValueError(f"`processes` must be at least 1, got {args.processes}.")
    lacking = [name for name in ("scipy", "sklearn") if find_spec(name) is None]
    if lacking:
        raise ValueError(
            f"`demo` must have the packages of its judges, got no {' and no '.join(lacking)}: "
            "pip install 'diffusers_ext[demo]'."
        )
    line = [sys.executable, str(script), "--output_dir", args.output_dir, "--parts", *args.parts]
    if args.processes is not None:
        line += ["--processes", str(args.processes)]
    # A process of its own: it sets threads and warnings for itself. Its words are no outcome.
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        for said in process.stdout:
            if not args.quiet:
                sys.stderr.write(said)
    page = Path(args.output_dir, PAGE)
    if process.returncode != DONE:
        text = f"The demo ended with exit code {process.returncode}; see above. What was done by then: {page}"
        return Outcome({"output_dir": Path(args.output_dir), "exit_code": process.returncode}, text, FAILED)
    tables = sorted(path.relative_to(args.output_dir).as_posix() for path in Path(args.output_dir).rglob("table.md"))
    return Outcome({"output_dir": Path(args.output_dir), "page": page, "tables": tables}, f"Wrote {page}")


DEMO = Command(
    name="demo",
    summary="run all three tools on small models that come along, and write a page",
    description="A model of tinted digits learns a new glyph, draws from golden noise, and a model of moving digits "
    "forgets one; every figure is measured on the way. Minutes on two cores, no GPU, nothing fetched.",
    examples=("demo", "demo --parts new_glyph --output_dir outputs/glyph"),
    add_arguments=_add_demo_arguments,
    run=_run_demo,
    output="output_dir",
    result_names=(PAGE,),
)
