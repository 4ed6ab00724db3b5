"""Run Python code in a process of its own, offline and with an empty Hugging Face cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


# Every attempt to reach another machine is an error there.
_NO_NETWORK = """
import json, socket, sys
def refuse(*arguments, **_):
    raise AssertionError(f"a connection was opened: {arguments}")
socket.socket.connect = socket.getaddrinfo = refuse
arguments = sys.argv[1:]
"""


def run_python(code: str, hf_home: Path, *arguments: str | Path) -> Any:
    """What `code` prints last, as JSON; `arguments` and `json` are at its hand."""
    environment = {**os.environ, "HF_HOME": str(hf_home), "OMP_NUM_THREADS": "1"}
    for name in ("HF_MODULES_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", _NO_NETWORK + code, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"The process failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
