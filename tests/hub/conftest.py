"""A Hub to which one fresh process has pushed everything once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fresh_process import run_python
from tests.hub_server import HubServer

PUSH = """
from tests.hub.push_and_load import push_all
print(json.dumps(push_all()))
"""
LOAD = """
from tests.hub.push_and_load import load_all
print(json.dumps(load_all(json.loads(arguments[0]), go_offline)))
"""


@dataclass
class RoundTrip:
    """The Hub after the pushes, what the pushing process knew of them, and a way to start others."""

    hub: HubServer
    pushed: dict[str, dict[str, str]]
    folder: Path

    def run(self, code: str, *arguments: str | Path, **options: Any) -> Any:
        """Run code in a fresh process with an empty cache."""
        home = self.folder / f"home-{len(self.hub.requests)}"
        variables = {**self.hub.environment(home), **options.pop("variables", {})}
        return run_python(code, home, *arguments, loopback=True, variables=variables, **options)


@pytest.fixture(scope="package")
def round_trip(tmp_path_factory) -> Iterator[RoundTrip]:
    with HubServer() as hub:
        trip = RoundTrip(hub, {}, tmp_path_factory.mktemp("round-trip"))
        trip.pushed = trip.run(PUSH)
        yield trip
        assert not hub.unknown


@pytest.fixture(scope="package")
def loaded(round_trip) -> dict[str, Any]:
    """What another process loads, in which no code from the Hub may run."""
    commits = {name: facts.get("commit") for name, facts in round_trip.pushed.items()}
    variables = {"DIFFUSERS_DISABLE_REMOTE_CODE": "1"}
    return round_trip.run(LOAD, json.dumps(commits), variables=variables)


@pytest.fixture(scope="package")
def without_package(round_trip) -> dict[str, Any]:
    """What a process loads in which this repository cannot be imported."""
    script = Path(__file__).with_name("without_package.py").read_text()
    # The future import must be the first statement, which the helper's own lines are.
    script = script.replace("from __future__ import annotations\n", "")
    return round_trip.run(script, package=False)
