"""A small Hub on the loopback address, for the real `huggingface_hub` client.

It speaks what the client needs to share and to load models and data sets, and answers 501 to everything else;
`HubServer.unknown` keeps those requests.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

from tests import hub_reading, hub_writing  # noqa: F401  (they register their routes)
from tests.hub_routes import Answer, Call, answer_call
from tests.hub_storage import HubError, Repository

USERS = {"hf_test": "tester", "hf_stranger": "stranger"}
FAILURES = ("drop", "truncate", "lost")


@dataclass
class Request:
    """One line of the log; `status` is 0 when the connection broke."""

    method: str
    path: str
    status: int = 0
    size: int = 0


@dataclass
class _Failure:
    method: str
    pattern: re.Pattern
    times: int
    how: str


@dataclass
class HubServer:
    """The Hub, to be used as a context manager.

    Attributes:
        repos: by name; those of data sets begin with `datasets/`.
        requests: all since the last `clear()`.
        unknown: those that have no answer here.
    """

    repos: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list, repr=False)
    unknown: list[Request] = field(default_factory=list)
    _failures: list[_Failure] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _connections: set[socket.socket] = field(default_factory=set)
    _server: ThreadingHTTPServer | None = None

    def __enter__(self) -> HubServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads, self._server.hub = True, self
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._connections):
            _cut(connection)

    @property
    def endpoint(self) -> str:
        return "http://{}:{}".format(*self._server.server_address)

    def environment(self, hf_home: str | Path, token: str | None = "hf_test") -> dict[str, str]:
        """Variables with which a process takes this server for the Hub; `None` is no login."""
        environment = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(hf_home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return environment if token is None else {**environment, "HF_TOKEN": token}

    def clear(self) -> None:
        """Forget all repositories, requests and failures to come."""
        with self._lock:
            for kept in (self.repos, self.requests, self.unknown, self._failures):
                kept.clear()

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Content of every file, but for the `.gitattributes` that each repository begins with."""
        prefix = "" if repo_type == "model" else f"{repo_type}s/"
        files = self.repos[prefix + repo_id].at(revision).files
        return {path: f.content for path, f in files.items() if path != ".gitattributes"}

    def sent(self, method: str, pattern: str) -> list[Request]:
        """Requests of the log whose path holds the pattern."""
        return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def fail_next(self, method: str, path_pattern: str, times: int = 1, how: str = "drop") -> None:
        """Break the next requests that match.

        Args:
            method: "GET", "PUT"...
            path_pattern: regular expression, searched in the unquoted path.
            times: number of requests.
            how: "drop" closes the connection without an answer, and amid the body of an upload; "truncate" closes it
                amid the answer; "lost" obeys and then closes it; a number such as "503" is the answer's status.
        """
        if how not in FAILURES and not how.isdecimal():
            raise ValueError(f"`how` must be one of {FAILURES} or a status, got {how!r}.")
        with self._lock:
            self._failures.append(_Failure(method, re.compile(path_pattern), times, how))

    def _failure_of(self, request: Request) -> str | None:
        with self._lock:
            for failure in self._failures:
                matches = failure.method == request.method and failure.pattern.search(request.path)
                if matches and failure.times > 0:
                    failure.times -= 1
                    return failure.how
        return None

    def _answer(self, call: Call) -> Answer:
        token = call.headers.get("Authorization", "").removeprefix("Bearer ")
        with self._lock:
            if token and token not in USERS:
                raise HubError(401, "Invalid credentials in Authorization header")
            call.user, call.users = USERS.get(token), set(USERS.values())
            call.repos, call.endpoint = self.repos, self.endpoint
            return answer_call(call)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body would wait 40 ms for the answer to its headers

    def setup(self) -> None:
        super().setup()
        self.server.hub._connections.add(self.connection)

    def finish(self) -> None:
        self.server.hub._connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        hub: HubServer = self.server.hub
        raw_path, _, query = self.path.partition("?")
        request = Request(self.command, unquote(raw_path))
        hub.requests.append(request)
        failure = hub._failure_of(request)
        if failure == "drop":
            next(self._body(), None)
            return self._break()
        body = b"".join(self._body())
        request.size = len(body)
        parameters = parse_qs(query)
        try:
            if failure and failure.isdecimal():
                raise HubError(int(failure), "Broken for a test.")
            answer = hub._answer(Call(self.command, raw_path, parameters, self.headers, body))
        except HubError as error:
            answer = Answer(error.message.encode(), error.status, error.headers)
        if answer.status == 501:
            hub.unknown.append(request)
        if failure == "lost":
            return self._break()
        request.status = 0 if failure == "truncate" else answer.status
        self._send(answer, cut=failure == "truncate")

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _body(self) -> Iterator[bytes]:
        """The body in parts, so that one may stop amid it."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            part = self.rfile.read(max(left // 2, min(left, 4096)))
            if not part:
                return
            left -= len(part)
            yield part

    def _send(self, answer: Answer, cut: bool) -> None:
        headers: Mapping[str, str] = {"Content-Length": str(len(answer.body)), **answer.headers}
        with suppress(ConnectionError):
            self.send_response(answer.status)
            for name, value in headers.items():
                self.send_header(name, value.replace("\n", " "))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body[: len(answer.body) // 2] if cut else answer.body)
        if cut:
            self._break()

    def _break(self) -> None:
        self.close_connection = True
        _cut(self.connection)

    def log_message(self, *_: object) -> None:
        """Say nothing: `HubServer.requests` is the log."""


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
