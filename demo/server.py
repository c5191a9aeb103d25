"""The local server around the page: loopback only, in both directions."""

import errno
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

HOST = "127.0.0.1"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Whatever the page's parts may try, the browser loads it from this server or not at all. Gradio
# needs inline scripts and styles, compiled templates, and blobs.
_POLICY = (
    b"default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    b"style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; object-src 'none'; "
    b"base-uri 'self'; form-action 'self'"
)

# Gradio serves these by fetching them.
_FETCHING = re.compile(r"/(proxy=|file[=/]\s*https?:)", re.IGNORECASE)


class DemoError(Exception):
    """Why the demo can't be started. The text is one sentence."""

    exit_code = 2


class LoopbackOnly:
    """ASGI middleware: no page loads anything from elsewhere, no route fetches it for others."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if _FETCHING.search(scope["path"]):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"only local files are served"})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [
                    (b"content-security-policy", _POLICY),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        await self.app(scope, receive, guarded)


def usable_port(port: int | None) -> int:
    """The port to listen on at 127.0.0.1; 0 and None stand for any free one.

    Raises:
        DemoError: the port is taken, out of range, or needs rights that this user lacks.
    """
    if port is not None and not 0 <= port <= 65535:
        raise DemoError(f"port {port}: not from 0 to 65535; --port 0 takes a free one")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port or 0))
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else "can't be opened"
            raise DemoError(
                f"port {port} {reason}; choose another with --port, or any free one with --port 0"
            ) from error
        return int(probe.getsockname()[1])
