"""The connection to the Hub: given up at the first failure, and told from other errors.

Below 1.0 the Hub's library stands on `requests`, above on `httpx`; what differs between the two is here alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import _http, hf_raise_for_status

try:
    from huggingface_hub.errors import RemoteEntryNotFoundError
except ImportError:  # below 1.0 one class for both: where it is caught, `LocalEntryNotFoundError` must come first
    from huggingface_hub.errors import EntryNotFoundError as RemoteEntryNotFoundError

__all__ = ["HTTP_ERROR", "HubUnreachable", "RemoteEntryNotFoundError", "answered_with", "one_try_to_connect",
           "unreachable", "validate_card"]  # fmt: skip

CONNECT_SECONDS = 3.0  # a network that swallows packets never refuses
_REMEMBERED_SECONDS = 60.0  # no further file of the same model waits again


class HubUnreachable(OfflineModeIsEnabled):
    """No connection to the Hub; its library then looks into the cache and does not try again."""


@dataclass
class _Contact:
    """What is known of the Hub by all clients of one command line.

    Once there was a connection, losses are met as usual: in a download of hours the Hub's own library goes on with its
    tries.
    """

    made: bool = False
    failed_at: float | None = None
    message: str = ""

    def first_try(self, send: Callable[[], Any], reason: Callable[[Exception], str | None]) -> Any:
        """What `send` answers, if it connects; `reason` says why it did not, of an error that means that."""
        if self.failed_at is not None and time.monotonic() - self.failed_at < _REMEMBERED_SECONDS:
            raise HubUnreachable(self.message)
        try:
            response = send()
        except _CONNECTION_ERRORS as error:
            why = reason(error)
            if why is None:
                raise
            self.failed_at = time.monotonic()
            self.message = f"no connection to {constants.ENDPOINT} ({why})"
            raise HubUnreachable(self.message) from error
        self.made = True
        return response


if hasattr(huggingface_hub, "set_client_factory"):
    _httpx = _http.httpx2 if hasattr(_http, "httpx2") else _http.httpx
    HTTP_ERROR: type[Exception] = _httpx.HTTPError  # any of a request, also that it was refused
    _LOST: tuple[type[Exception], ...] = (_httpx.TransportError,)
    _CONNECTION_ERRORS: tuple[type[Exception], ...] = (_httpx.ConnectError, _httpx.ConnectTimeout, _httpx.ProxyError)

    class _OneTryClient(_httpx.Client):
        """A client that connects in its first try or not at all."""

        def __init__(self, contact: _Contact) -> None:
            # As the default client of the Hub's library.
            hooks: dict[str, Any] = {"request": [_http.hf_request_event_hook]}
            super().__init__(event_hooks=hooks, follow_redirects=True, timeout=None)
            self.contact = contact

        def send(self, request: Any, **arguments: Any) -> Any:
            send = super().send
            if self.contact.made:
                return send(request, **arguments)
            timeout = request.extensions.get("timeout", {}) | {"connect": CONNECT_SECONDS}
            request.extensions = {**request.extensions, "timeout": timeout}
            return self.contact.first_try(lambda: send(request, **arguments), str)

    def _use(contact: _Contact) -> None:
        huggingface_hub.set_client_factory(lambda: _OneTryClient(contact))

    def _use_default() -> None:
        huggingface_hub.set_client_factory(_http.default_client_factory)

else:
    _requests = _http.requests
    HTTP_ERROR = _requests.RequestException
    _LOST = (_requests.ConnectionError, _requests.Timeout, _requests.exceptions.ChunkedEncodingError)
    _CONNECTION_ERRORS = (_requests.ConnectionError,)  # also of a connection that was lost

    def _reason(error: Exception) -> str | None:
        """Why there is no connection; `None` of an error that came after there was one."""
        reason = getattr(error.args[0], "reason", None)
        return None if reason is None else str(reason).split(": ", 1)[-1]

    class _OneTryAdapter(_http.UniqueRequestIdAdapter):
        """A transport that connects in its first try or not at all."""

        def __init__(self, contact: _Contact) -> None:
            super().__init__()
            self.contact = contact

        def send(self, request: Any, stream: bool = False, timeout: Any = None, **arguments: Any) -> Any:
            send = super().send
            if self.contact.made:
                return send(request, stream, timeout, **arguments)
            timeout = (CONNECT_SECONDS, timeout[1] if isinstance(timeout, tuple) else timeout)
            return self.contact.first_try(lambda: send(request, stream, timeout, **arguments), _reason)

    def _use(contact: _Contact) -> None:
        def session() -> Any:
            made = _http._default_backend_factory()
            if not constants.HF_HUB_OFFLINE:
                made.mount("http://", _OneTryAdapter(contact))
                made.mount("https://", _OneTryAdapter(contact))
            return made

        huggingface_hub.configure_http_backend(session)

    def _use_default() -> None:
        huggingface_hub.configure_http_backend()


def validate_card(card: huggingface_hub.RepoCard) -> None:
    """Let the Hub read a card; raises `ValueError` where it refuses the header."""
    # Below 2.0 `card.validate` asks the public Hub, whichever one the card is for.
    body, headers = {"repoType": card.repo_type, "content": str(card)}, {"Accept": "text/plain"}
    url = f"{constants.ENDPOINT}/api/validate-yaml"
    answer = huggingface_hub.get_session().post(url, json=body, headers=headers)
    if answer.status_code == 400:
        raise ValueError(answer.text)
    hf_raise_for_status(answer)


@contextmanager
def one_try_to_connect() -> Iterator[None]:
    """While it lasts, the Hub is given up when the first connection fails, within seconds; the cache is still read.

    It is of the whole process, for command lines; the library itself leaves the Hub's client as its user has set it.
    """
    _use(_Contact())
    try:
        yield
    finally:
        _use_default()


def answered_with(error: Exception) -> int | None:
    """The status of the answer that an `HTTP_ERROR` comes from; `None` of one without an answer."""
    # Below 1.0 errors of the Hub's library are of its own class everywhere but in `whoami`.
    return getattr(getattr(error, "response", None), "status_code", None)


def unreachable(error: BaseException) -> str | None:
    """Why the Hub could not be asked where an error comes from that, else `None`."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if isinstance(found, (OfflineModeIsEnabled, *_LOST)):
            return "offline mode is on" if constants.HF_HUB_OFFLINE else str(found).split("\n")[0]
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None
