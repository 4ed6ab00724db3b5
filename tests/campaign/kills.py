"""Kill runs with SIGKILL at varied moments, resume them, and compare with runs that were left alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from examples.digits.pictures import draw_glyphs, tint
from tests.training.eraser_runs import eraser_line, write_eraser_files
from tests.training.noise_runs import noise_line
from tests.training.noise_sets import write_noises
from tests.training.pair_runs import QUICK_PAIRS, write_prompt_file
from tests.training.script_runs import QUICK, REPOSITORY, command_line, environment, write_prompts

KILLS = 4  # of every job
# Of reports: the flags, one of which resumes, the time, and what the last of several runs did.
_VOLATILE = ("arguments", "seconds", "this_run")
_SERVER = """
import json, os, sys, warnings

sys.path.insert(0, {repository!r})
warnings.simplefilter("ignore")
import importlib
import torch
import transformers.models.clip.modeling_clip, transformers.models.clip.tokenization_clip

log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for request in sys.stdin:
    script, line = json.loads(request)
    module = importlib.import_module("training." + script)
    pid = os.fork()
    if pid == 0:
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        code = 0
        try:
            module.main(module.parse_args(line))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            code = 1
        os._exit(code)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Job(NamedTuple):
    """A script, its flags but for the output folder, and how many threads of it are alike."""

    script: str
    line: Callable[[Path], list[str]]


class Kill(NamedTuple):
    """One run that was killed and resumed; `detail` says what differs."""

    job: str
    after: float  # share of the time that a whole run takes
    outcome: str
    detail: str = ""


def jobs(work: Path) -> dict[str, Job]:
    """Six jobs on tiny models, with all their inputs below `work`."""
    work.mkdir(parents=True)
    prompts = write_prompts(work / "knowledge.txt")
    pictures = work / "pictures"
    pictures.mkdir()
    for index, ink in enumerate(draw_glyphs("triangle", 3, seed=0)):
        Image.fromarray(tint(ink, "white")).save(pictures / f"{index}.png")
    noises = write_noises(work / "noises", 2)
    eraser = write_eraser_files(work / "eraser")
    pair_prompts = write_prompt_file(work / "prompts.txt")
    subject = {
        "instance_data_dir": pictures, "instance_prompt": "a white sks", "knowledge_prompts": prompts,
        "resolution": 32, "max_train_steps": 12, "train_batch_size": 2, "num_inference_steps": 3,
        "lora_dropout": 0.3, "lr_scheduler": "cosine", "checkpointing_steps": 2,
        "checkpoints_total_limit": 2,
    }  # fmt: skip
    statistics = {
        **QUICK, "statistics_batch_size": 1, "knowledge_prompts": prompts, "features": ["q", "v"],
    }  # fmt: skip
    pairs = {**QUICK_PAIRS, "prompt_file": pair_prompts, "noises_per_prompt": 3}
    steps = {"max_train_steps": 10, "checkpointing_steps": 2, "checkpoints_total_limit": 2}
    kept = {**steps, "num_target_trajectories": 4, "num_preserved_trajectories": 4}
    return {
        "statistics": Job("build_covariance", lambda out: command_line(output_dir=out, **statistics)),
        "null-space training": Job(
            "train_nullspace_dreambooth", lambda out: command_line(output_dir=out, **subject)
        ),
        "pair generation": Job("generate_npd", lambda out: command_line(output_dir=out, **pairs)),
        "noise training": Job(
            "train_noise_sequence", lambda out: noise_line("rnn", noises, out, use_ema=True, **steps)
        ),
        "eraser training": Job(
            "train_cogvideox_eraser", lambda out: eraser_line(eraser, out, **steps)
        ),
        "teacher samples": Job(
            "train_cogvideox_eraser",
            lambda out: eraser_line(eraser, out, trajectories_dir=out / "teacher", **kept),
        ),
    }  # fmt: skip


class Runner:
    """Forks runs from one process that has everything imported."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        server = folder / "server.py"
        server.write_text(_SERVER.format(repository=str(REPOSITORY), log=str(self.log)))
        self._process = subprocess.Popen(
            [sys.executable, str(server)],
            cwd=REPOSITORY, env={**environment(), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, job: Job, out: Path, *, resume: bool, after: float | None = None) -> tuple[int, float]:
        """Run a job, killed after so many seconds if it still runs; the status and the time it took."""
        line = job.line(out) + (["--resume_from_checkpoint", "latest"] if resume else [])
        self._process.stdin.write(json.dumps([job.script, line]) + "\n")
        self._process.stdin.flush()
        pid, start = int(self._process.stdout.readline()), time.monotonic()
        if after is not None:
            _kill(pid, after)
        return int(self._process.stdout.readline()), time.monotonic() - start

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _kill(pid: int, after: float) -> None:
    """SIGKILL a process after so many seconds, unless it ends before; never another of its number."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    time.sleep(after)
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(descriptor)


def kills(work: Path, seed: int = 0, count: int = KILLS, only: str | None = None) -> Iterator[Kill]:
    """Kill every job `count` times, each run several times on its way, and resume it to the end."""
    rng = random.Random(seed)
    made = jobs(work / "inputs")
    runner = Runner(work)
    try:
        for name, job in made.items():
            if only is not None and only not in name:
                continue
            runner.run(job, work / "warm", resume=False)  # modules are imported, files in memory
            shutil.rmtree(work / "warm", ignore_errors=True)
            status, seconds = runner.run(job, work / "whole", resume=False)
            if status:
                raise RuntimeError(f"{name} must end by itself, got: {runner.log.read_text()[-2000:]}")
            expected = content(work / "whole")
            for number in range(count):
                # Spread over the run, the last ones near its end, where results are written.
                after = (number + rng.random()) / count
                yield _killed(runner, job, name, work / "killed", after, seconds, expected)
                shutil.rmtree(work / "killed", ignore_errors=True)
            shutil.rmtree(work / "whole")
    finally:
        runner.close()


def _killed(runner: Runner, job: Job, name: str, out: Path, after: float, seconds: float, expected: Any) -> Kill:
    for _ in range(5):
        status, _ = runner.run(job, out, resume=False, after=after * seconds)
        if os.WIFSIGNALED(status):
            break
        if status:
            return Kill(name, after, "failed", runner.log.read_text()[-500:])
        shutil.rmtree(out)  # it was done before: earlier, then, on this machine
        after *= 0.8
    else:
        return Kill(name, after, "ended before the kill")
    left = out.is_dir() and any(out.iterdir())
    status, _ = runner.run(job, out, resume=left)
    if status:
        said = runner.log.read_text().strip().splitlines()[-1]
        # Before the first checkpoint there is nothing to go on from, and the script says so.
        if "checkpoint" not in said or "must name" not in said:
            return Kill(name, after, "cannot be resumed", said[:500])
        shutil.rmtree(out)
        status, _ = runner.run(job, out, resume=False)
        if status:
            return Kill(name, after, "cannot be started again", runner.log.read_text()[-500:])
    found = content(out)
    if found == expected:
        return Kill(name, after, "equal to the bit")
    names = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    return Kill(name, after, "different", ", ".join(names)[:500])


def content(folder: Path) -> dict[str, Any]:
    """What a run leaves, without its checkpoints and what differs between two runs of one command."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.startswith(("checkpoint-", "logs/")) or "tfevents" in name:
            continue
        found[name] = path.read_bytes()
        if path.name in ("training_report.json", "report.json"):
            report = json.loads(found[name])
            found[name] = {key: value for key, value in report.items() if key not in _VOLATILE}
    return found


def run_kills(seed: int, work: Path, only: str | None = None) -> bool:
    """Print what became of every killed run; whether one differs."""
    done = []
    for kill in kills(work / "kills", seed, only=only):
        done.append(kill)
        print(f"  killed at {kill.after:4.0%} of {kill.job}: {kill.outcome} {kill.detail}", flush=True)
    killed = [kill for kill in done if kill.outcome != "ended before the kill"]
    same = sum(kill.outcome == "equal to the bit" for kill in killed)
    print(f"{same} of {len(killed)} killed runs are equal to the bit")
    return same < len(killed)
