"""How a request to the local Hub finds its answer, and who may ask for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from tests.hub_storage import HubError, Repository


@dataclass
class Call:
    """One request, with who asks and what there is."""

    method: str
    raw_path: str
    parameters: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    user: str | None = None
    users: set[str] = field(default_factory=set)
    repos: dict[str, Repository] = field(default_factory=dict)
    endpoint: str = ""

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def asks(self, parameter: str) -> bool:
        return self.parameters.get(parameter, ["false"])[-1].lower() in ("1", "true")

    def repository(self, prefix: str, name: str, *, write: bool = False) -> Repository:
        """The repository, if the user may see it and, where asked, change it."""
        repo = self.repos.get(prefix + name)
        if repo is None or not self.may_read(repo):
            if self.user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write:
            self.writing_in(name.split("/")[0])
        return repo

    def may_read(self, repo: Repository) -> bool:
        return not repo.private or self._may_write(repo.repo_id.split("/")[0])

    def _may_write(self, owner: str) -> bool:
        # Everybody is a member of every organization: of each name that is no user's.
        return self.user is not None and owner not in self.users - {self.user}

    def writing_in(self, owner: str) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if not self._may_write(owner):
            raise HubError(403, f"You don't have the rights to write in the namespace {owner!r}.")


@dataclass(frozen=True)
class Answer:
    """Body, status and headers."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


def json_answer(content: Any, status: int = 200) -> Answer:
    return Answer(json.dumps(content).encode(), status, {"Content-Type": "application/json"})


ROUTES: list[tuple[str, re.Pattern, Callable[..., Answer]]] = []
API = r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)"
PAGE = r"/(?P<prefix>datasets/)?(?P<name>[^/]+/[^/]+)"


def route(methods: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.extend((method, re.compile(pattern), function) for method in methods.split())
        return function

    return register


def answer_call(call: Call) -> Answer:
    """The answer, or `HubError`."""
    for method, pattern, function in ROUTES:
        if method == call.method and (found := pattern.fullmatch(call.raw_path)):
            groups = {key: unquote(value or "") for key, value in found.groupdict().items()}
            if "kind" in groups:
                groups["prefix"] = "" if groups.pop("kind") == "model" else "datasets/"
            return function(call, **groups)
    raise HubError(501, f"{call.method} {call.raw_path} is not known here.")
