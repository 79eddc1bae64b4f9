"""The Prefect server, answering this machine only.

Prefect accepts any Host and any site's scripts, so a page open in a browser here could start flows: under a name that
it has point to 127.0.0.1 (DNS rebinding), or by a request across sites. docs/security.md: a server for several people.

    python -m uvicorn --factory flows.guard:create_app --host 127.0.0.1
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from prefect.server.api.server import create_app as prefect_app
from starlette.responses import PlainTextResponse

NAMES = ("127.0.0.1", "localhost", "::1")


def create_app() -> Any:
    """The server's ASGI app behind the check."""
    app = prefect_app(final=True)

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or allowed(dict(scope["headers"])):
            await app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await PlainTextResponse("This server answers its own machine only.", 403)(scope, receive, send)

    return guarded


def allowed(headers: dict[bytes, bytes]) -> bool:
    """Whether a request was made to this machine by name, and not by a page of another site."""
    try:
        host = urlsplit("//" + headers.get(b"host", b"").decode("latin-1"))
        origin = urlsplit(headers[b"origin"].decode("latin-1")) if b"origin" in headers else host
        return host.hostname in NAMES and origin.hostname in NAMES and origin.port == host.port
    except ValueError:  # no address at all
        return False
