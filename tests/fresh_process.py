"""Run Python code in a process of its own, offline and with an empty Hugging Face cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
# Every attempt to reach another machine is an error there.
_START = """
import json, os, socket, sys
def refuse(*arguments, **_):
    raise AssertionError(f"a connection was opened: {arguments}")
def only_loopback(function, host_of):
    def call(*arguments, **options):
        if host_of(arguments) not in ("127.0.0.1", "localhost"):
            refuse(*arguments)
        return function(*arguments, **options)
    return call
def go_offline():
    "From here on the loopback address is refused too."
    socket.socket.connect = socket.getaddrinfo = refuse
    if "huggingface_hub" in sys.modules:
        hub = sys.modules["huggingface_hub"]
        if hasattr(hub, "close_session"):
            hub.close_session()
        else:  # below 1.0
            hub.utils._http.reset_sessions()
if os.environ.pop("TEST_LOOPBACK", None):
    socket.socket.connect = only_loopback(socket.socket.connect, lambda a: a[1][0])
    socket.getaddrinfo = only_loopback(socket.getaddrinfo, lambda a: a[0])
else:
    go_offline()
arguments = sys.argv[1:]
"""
# As if the repository had never been there, installed or on the path.
_HIDE = """
import importlib.util
def holds_package(folder):
    return os.path.isdir(os.path.join(folder, "diffusers_ext"))
sys.path[:] = [folder for folder in sys.path if not holds_package(folder or os.getcwd())]
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
sys.path_importer_cache.clear()
if importlib.util.find_spec("diffusers_ext") is not None:
    raise AssertionError(f"diffusers_ext is still there, on one of {sys.path}")
"""


def run_python(
    code: str,
    hf_home: Path,
    *arguments: str | Path,
    loopback: bool = False,
    package: bool = True,
    variables: Mapping[str, str] | None = None,
) -> Any:
    """What `code` prints last, as JSON; `arguments`, `json` and `go_offline()` are at its hand.

    Args:
        code: of the process.
        hf_home: folder of its Hugging Face cache.
        arguments: strings for it.
        loopback: it may connect to the loopback address.
        package: `False` is a process in which this repository cannot be imported.
        variables: further environment variables.

    Raises:
        RuntimeError: the process fails; holds the end of what it said.
    """
    environment = {**os.environ, "HF_HOME": str(hf_home), "OMP_NUM_THREADS": "1"}
    for name in ("HF_MODULES_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    if variables is not None and "HF_ENDPOINT" in variables:
        environment.pop("HF_TOKEN", None)
    environment |= {**(variables or {}), **({"TEST_LOOPBACK": "1"} if loopback else {})}
    if not package:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", _START + (_HIDE if not package else "") + code, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
        cwd=_ROOT if package else Path(sys.prefix),
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"The process failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
