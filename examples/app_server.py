"""What the app's web server accepts and answers: its own content, small requests, no files."""

from __future__ import annotations

from typing import Any

# The page and what it draws come from this server; the browser refuses everything else.
_CONTENT_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
LARGEST_REQUEST = 64 * 1024  # bytes; a prompt and three numbers are far smaller
_NO_UPLOADS = "Nothing can be uploaded to this app: it reads a prompt, a seed and a strength."
_TOO_LARGE = f"A request must have at most {LARGEST_REQUEST} bytes."


class OwnContentOnly:
    """Adds the content policy to every answer of a web application."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _CONTENT_POLICY.encode())
                message["headers"] = [*message["headers"], policy]
            await send(message)

        await self.app(scope, receive, send_with_policy)


class SmallRequestsOnly:
    """Refuses uploads (403) and large requests (413) before the application reads them."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif "upload" in scope["path"].lower():
            await _answer(send, 403, _NO_UPLOADS)
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Any, receive: Any, send: Any) -> None:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > LARGEST_REQUEST:
            await _answer(send, 413, _TOO_LARGE)
            return
        # Without a length, or with a false one, the body itself tells; it is read here whole.
        messages, size = [], 0
        if scope["method"] in ("POST", "PUT", "PATCH"):
            while not messages or messages[-1].get("more_body"):
                messages.append(await receive())
                size += len(messages[-1].get("body", b""))
                if size > LARGEST_REQUEST:
                    await _answer(send, 413, _TOO_LARGE)
                    return

        async def replay() -> dict[str, Any]:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)


async def _answer(send: Any, status: int, words: str) -> None:
    body = words.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # the rest of the request is not read
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
