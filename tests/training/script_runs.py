"""The scripts as their users run them: in this process, or under a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from diffusers_ext.nullspace.statistics import FeatureStatistics
from examples.digits.check_model import MODEL_DIR

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPTS = (
    "a photo of the red digit seven",
    "a blue three",
    "a picture of a green two",
    "the number nine in white",
    "a drawing of the yellow number one",
)

EVALUATED = PROMPTS[:2]
QUICK = {"num_inference_steps": 2, "guidance_scale": 3.0, "statistics_batch_size": 2}


def write_prompts(path: Path, prompts: tuple[str, ...] = PROMPTS) -> Path:
    path.write_text("\n".join(["# known", "", *prompts, ""]))
    return path


def command_line(**arguments: Any) -> list[str]:
    """Flags of a script that runs on the digits model; lists are several values of one flag."""
    arguments = {"pretrained_model_name_or_path": MODEL_DIR, **arguments}
    line = []
    for name, value in arguments.items():
        if value is True:
            line.append(f"--{name}")
        elif value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            line += [f"--{name}", *map(str, values)]
    return line


def environment() -> dict[str, str]:
    """With as many threads as here, so that sums round alike."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}


def launch(script: str, line: list[str], processes: int) -> str:
    """Run a script under `accelerate launch` on the CPU; returns what it wrote to stderr."""
    # `--cpu` would start one process, whatever the number asked for.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
                "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no",
                "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    done = subprocess.run(
        [*launcher, f"training/{script}.py", *line],
        cwd=REPOSITORY,
        env={**environment(), "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def assert_same_totals(first: FeatureStatistics, second: FeatureStatistics) -> None:
    """Equal to the bit, with equal sources and facts."""
    assert first.moments.keys() == second.moments.keys()
    assert first.sources == second.sources
    assert first.facts == second.facts
    for key, moment in first.moments.items():
        assert torch.equal(moment.total, second.moments[key].total), key
        assert moment.count == second.moments[key].count


def files_below(folder: Path) -> set[str]:
    """All files but the list of the result's own."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".result.json")
    return {path.relative_to(folder).as_posix() for path in files}
