"""What the Hub's library raises where a connection breaks: it stands on `requests` below 1.0, on `httpx` above."""

from __future__ import annotations

import huggingface_hub
from huggingface_hub.utils import _http

TRUNCATED_IS_TRIED_AGAIN = not hasattr(_http, "requests")  # by the library itself
if not TRUNCATED_IS_TRIED_AGAIN:
    CONNECTION_REFUSED = CONNECTION_LOST = _http.requests.ConnectionError
    LOST = "closed connection|Connection reset"
else:
    _httpx = _http.httpx2 if hasattr(_http, "httpx2") else _http.httpx
    CONNECTION_REFUSED, CONNECTION_LOST = _httpx.ConnectError, _httpx.RemoteProtocolError
    LOST = "disconnected"


def close_sessions() -> None:
    """Let the Hub's library open its connections anew: below 1.0 open ones do not ask whether it is offline."""
    if hasattr(huggingface_hub, "close_session"):
        huggingface_hub.close_session()
    else:
        _http.reset_sessions()
