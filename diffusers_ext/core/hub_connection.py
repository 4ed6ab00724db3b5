"""A Hub that cannot be reached is given up after one try, so that a command line says so at once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from huggingface_hub.utils._http import default_client_factory, hf_request_event_hook


CONNECT_SECONDS = 3.0  # a network that swallows packets never refuses
_REMEMBERED_SECONDS = 60.0  # no further file of the same model waits again


class HubUnreachable(OfflineModeIsEnabled):
    """No connection to the Hub; its library then looks into the cache and does not try again."""


@dataclass
class _Contact:
    """What is known of the Hub by all clients of one command line."""

    made: bool = False
    failed_at: float | None = None
    message: str = ""


class _OneTryClient(httpx.Client):
    """A client that connects in its first try or not at all.

    Once it was connected, losses are met as usual: in a download of hours the Hub's own library goes
    on with its five tries.
    """

    def __init__(self, contact: _Contact) -> None:
        # As the default client of the Hub's library.
        hooks: dict[str, Any] = {"request": [hf_request_event_hook]}
        super().__init__(event_hooks=hooks, follow_redirects=True, timeout=None)
        self.contact = contact

    def send(self, request: httpx.Request, **arguments: Any) -> httpx.Response:
        contact = self.contact
        if contact.made:
            return super().send(request, **arguments)
        if contact.failed_at is not None:
            if time.monotonic() - contact.failed_at < _REMEMBERED_SECONDS:
                raise HubUnreachable(contact.message)
        timeout = request.extensions.get("timeout", {}) | {"connect": CONNECT_SECONDS}
        request.extensions = {**request.extensions, "timeout": timeout}
        try:
            response = super().send(request, **arguments)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            contact.failed_at = time.monotonic()
            contact.message = f"no connection to {constants.ENDPOINT} ({error})"
            raise HubUnreachable(contact.message) from error
        contact.made = True
        return response


@contextmanager
def one_try_to_connect() -> Iterator[None]:
    """While it lasts, the Hub is given up when the first connection fails, within seconds.

    What has been downloaded before is still found in the cache. It is of the whole process, for
    command lines; the library itself leaves the Hub's client as its user has set it.
    """
    contact = _Contact()
    huggingface_hub.set_client_factory(lambda: _OneTryClient(contact))
    try:
        yield
    finally:
        huggingface_hub.set_client_factory(default_client_factory)


def unreachable(error: BaseException) -> str | None:
    """Why the Hub could not be asked where an error comes from that, else `None`."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if isinstance(found, (OfflineModeIsEnabled, httpx.TransportError)):
            return "offline mode is on" if constants.HF_HUB_OFFLINE else str(found).split("\n")[0]
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None


def not_found(argument: str, source: str | os.PathLike, kind: str, error: BaseException) -> str:
    """One line for what neither a folder nor the Hub has given."""
    reason = unreachable(error)
    wanted = f"`{argument}` must be a folder or Hub name of {kind}, got {source}"
    if Path(source).exists() or reason is None:
        return f"{wanted}: {' '.join(str(error).split())}"
    return (
        f"{wanted}: no such folder, and the Hub cannot be asked: {reason}. Check the connection, give "
        "a folder, or download it where there is a network: what is in the cache needs none."
    )
