"""Parts as processes of their own: one at work, the next one importing meanwhile, each with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

GO, DONE, INTERRUPTED = "go\n", "done", "interrupted"
_LAST_LINES, _LAST_LETTERS = 3, 400  # of what a part that failed has written
_NOTICES = "[transformers]"  # that are no reason


class Part(NamedTuple):
    """What is measured by one process.

    Attributes:
        limit: seconds after which it is stopped; starting is in them.
        function: `"module:function"` of `benchmarks.gpu`, which takes a `Place`.
    """

    name: str
    title: str
    function: str
    limit: float


class Outcome(NamedTuple):
    """How a part ended: `DONE`, or why it is not whole; its rows are those that it told till then."""

    status: str
    seconds: float
    rows: list[dict[str, Any]]

    @property
    def facts(self) -> dict[str, Any]:
        """Device, versions and date, which a part tells first; none where it did not come to that."""
        return next((row["machine"] for row in self.rows if "machine" in row), {})

    @property
    def figures(self) -> list[dict[str, Any]]:
        """All rows but those facts."""
        return [row for row in self.rows if "machine" not in row]


class Worker:
    """A process that imports at once and begins when it is told to; it writes rows, one a line, into a file."""

    def __init__(self, command: Sequence[str], rows: Path) -> None:
        self.rows, self.log, self.stopped = rows, rows.with_suffix(".log"), False
        # Each of these processes imports the same: the first one may leave what it has compiled.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def work(self, limit: float) -> Outcome:
        """Let it begin; stop it after so many seconds, or where the user interrupts."""
        began = time.monotonic()
        try:
            self.process.communicate(GO, timeout=limit)
        except subprocess.TimeoutExpired:
            status = f"stopped at its limit of {limit:.0f} s"
        except KeyboardInterrupt:
            status = INTERRUPTED
        else:
            code = self.process.returncode
            status = f"failed ({code}): {self._last_lines()}" if code else DONE
        self.stop()
        return Outcome(status, time.monotonic() - began, read_rows(self.rows))

    def stop(self) -> None:
        """End it and what it has started, as compilers, and wait until it has given back the GPU."""
        if self.stopped:
            return
        self.stopped = True  # its number may be another process's from now on
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()

    def _last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").replace("\r", "\n").splitlines()
        return " / ".join(
            [line.strip() for line in lines if line.strip() and not line.startswith(_NOTICES)][-_LAST_LINES:]
        )[-_LAST_LETTERS:]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a part; one that was being written when it was stopped is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def work_through(
    parts: Sequence[Part], command: Callable[[Part, Path], Sequence[str]], folder: Path, total: float, ahead: bool
) -> Iterator[tuple[Part, Outcome]]:
    """Do parts one after the other, each within its limit and all within `total` seconds.

    Where the user interrupts, what the part at work has told is given before `KeyboardInterrupt` goes on.

    Args:
        command: of the process of a part, by the file for its rows.
        folder: for rows and logs.
        ahead: the next part imports while one is at work.
    """
    deadline, started = time.monotonic() + total, {}

    def start(index: int) -> None:
        if index < len(parts) and index not in started:
            rows = folder / f"{parts[index].name}.jsonl"
            rows.unlink(missing_ok=True)
            started[index] = Worker(command(parts[index], rows), rows)

    try:
        for index, part in enumerate(parts):
            left = deadline - time.monotonic()
            if left <= 0:
                yield part, Outcome("not begun: the time for all parts was up", 0.0, [])
                continue
            start(index)
            if ahead:
                start(index + 1)
            outcome = started[index].work(min(part.limit, left))
            yield part, outcome
            if outcome.status == INTERRUPTED:
                raise KeyboardInterrupt
    finally:
        for worker in started.values():
            worker.stop()
