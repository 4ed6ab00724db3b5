"""Scripts to be killed, or in several processes: forked from one that has everything imported, to save time."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.training.script_runs import REPOSITORY, environment

_SERVER = """
import json, os, sys
from importlib import import_module

sys.path.insert(0, {repository!r})
import transformers.models.clip.modeling_clip, transformers.models.clip.tokenization_clip

log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for request in sys.stdin:
    asked = json.loads(request)
    for module in asked["modules"]:
        import_module(module)
    pids = []
    for rank in range(asked["processes"]):
        pid = os.fork()
        if pid == 0:
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            if asked["processes"] > 1:
                os.environ.update(asked["variables"], RANK=str(rank), LOCAL_RANK=str(rank))
            try:
                exec(asked["code"], {{}})
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    print(pids[-1], flush=True)
    print(*[os.waitpid(pid, 0)[1] for pid in pids], flush=True)
"""


def run_of(script: str, line: list[str]) -> str:
    """Code that runs a script of `training`."""
    return f"from training import {script} as script\nscript.main(script.parse_args({line!r}))\n"


class ScriptServer:
    """Runs code in processes of its own, one run at a time; kills it, or waits for it."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        server = folder / "server.py"
        server.write_text(_SERVER.format(repository=str(REPOSITORY), log=str(self.log)))
        self._process = subprocess.Popen(
            [sys.executable, str(server)],
            cwd=REPOSITORY,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _start(self, code: str, modules: Iterable[str], processes: int = 1) -> int:
        """Number of the last process."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
        variables |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
        request = {"code": code, "modules": list(modules), "processes": processes, "variables": variables}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def run(self, code: str, modules: Iterable[str], processes: int) -> None:
        """Run code in so many processes that know each other, as a launcher's do; `modules` are imported before."""
        self._start(code, modules, processes)
        statuses = self._process.stdout.readline().split()
        assert statuses == ["0"] * processes, self.log.read_text()

    def kill_when(self, script: str, line: list[str], is_time: Callable[[], bool], patch: str = "") -> None:
        """Run a script of `training` after `patch`; SIGKILL it as soon as `is_time()`."""
        pid = self._start(f"exec({patch!r}, {{}})\n{run_of(script, line)}", [f"training.{script}"])
        deadline = time.monotonic() + 240
        while not is_time():
            if select.select([self._process.stdout], [], [], 0)[0]:
                status = int(self._process.stdout.readline())  # or the next run would take it for its own
                raise AssertionError(f"ended by itself with {status}: {self.log.read_text()}")
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        status = int(self._process.stdout.readline())
        assert os.WIFSIGNALED(status), self.log.read_text()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
