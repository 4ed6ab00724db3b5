"""The whole test session talks to a local Hub: the libraries read its address when imported."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fresh_process import run_python
from tests.hub_server import HubServer
from tests.installed_versions import lacking, what_transformers_lets_peft_do

if "huggingface_hub" in sys.modules:
    raise RuntimeError("`huggingface_hub` must be imported after tests/conftest.py, got it before.")

gc.disable()  # until everything is imported
_HOME = tempfile.TemporaryDirectory(prefix="hf-home-", ignore_cleanup_errors=True)
_SERVER = HubServer().__enter__()
for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
    del os.environ[_name]
for _name in ("TRANSFORMERS_OFFLINE", "DIFFUSERS_DISABLE_REMOTE_CODE"):
    os.environ.pop(_name, None)
os.environ.update(_SERVER.environment(_HOME.name))


def pytest_configure(config: pytest.Config) -> None:
    # How `huggingface_hub` itself calls its HTTP client when it uploads a large file.
    config.addinivalue_line("filterwarnings", "ignore:Use 'content=:DeprecationWarning")
    # How diffusers asks it for a config.
    config.addinivalue_line("filterwarnings", "ignore:The `local_dir_use_symlinks`:UserWarning")
    # How peft below 0.21 looks for the config of a model that came from nowhere.
    config.addinivalue_line("filterwarnings", "ignore:Could not find a config file in  -:UserWarning")
    # Of which diffusers makes Chroma's transformer itself.
    config.addinivalue_line("filterwarnings", "ignore:`FluxPosEmbed` is deprecated:FutureWarning")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Spare the garbage collector what has been imported: 600,000 objects that stay, a third of a second each time."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(2000, 10, 10)  # a test makes many objects, and few that stay
        gc.enable()


# Folders and files with tests that start processes or train; the first takes longest.
_SLOW = ("training", "hub", "docs", "examples", "planning", "community", "benchmarks", "campaign",
         "test_wheel.py", "test_package.py", "test_imports.py")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first: workers that share the files then end at about the same time."""
    for item in items:
        if reason := lacking(item.name):
            item.add_marker(pytest.mark.skip(reason=reason))
    slow = [Path(__file__).parent / name for name in _SLOW]

    def place(path: Path) -> int:
        return next((index for index, one in enumerate(slow) if path.is_relative_to(one)), len(slow))

    places = {path: place(path) for path in {item.path for item in items}}

    items.sort(key=lambda item: places[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with what_transformers_lets_peft_do():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with what_transformers_lets_peft_do():
        return (yield)


def pytest_unconfigure() -> None:
    _SERVER.__exit__()
    _HOME.cleanup()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """The session's Hub, empty, and nothing of it in the cache that all tests share.

    A request that it does not know fails the test.
    """
    _SERVER.clear()
    yield _SERVER
    unknown = [f"{request.method} {request.path}" for request in _SERVER.unknown]
    _SERVER.clear()
    _forget_repositories()
    assert not unknown


def _forget_repositories() -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    if cache.is_dir() and cache.is_relative_to(_HOME.name):
        shutil.rmtree(cache)


@pytest.fixture
def hub_process(hub, tmp_path) -> Callable[..., Any]:
    """Run code against `hub` in a fresh process, with a cache of the test; as `run_python`."""

    def run(code: str, *arguments: str | Path, token: str | None = "hf_test", **options: Any) -> Any:
        home = tmp_path / options.pop("home", "hf-home")
        variables = {**hub.environment(home, token), **options.pop("variables", {})}
        return run_python(code, home, *arguments, loopback=True, variables=variables, **options)

    return run
