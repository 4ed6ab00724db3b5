"""Scripts to be killed: forked from one process that has everything imported, to save time."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
    script = import_module("training." + asked["script"])
    pid = os.fork()
    if pid == 0:
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        try:
            exec(asked["patch"], {{}})
            script.main(script.parse_args(asked["line"]))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class ScriptServer:
    """Starts scripts in processes of their own, one at a time, and kills them."""

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

    def kill_when(self, script: str, line: list[str], is_time: Callable[[], bool], patch: str = "") -> None:
        """Run a script of `training` after `patch`; SIGKILL it as soon as `is_time()`."""
        request = {"script": script, "line": line, "patch": patch}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
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
