"""Decides which requests are answered, before anything of their bodies is read.

- Without a token, only requests to this machine's own names are answered: a page whose host name was pointed
  at this machine (DNS rebinding) states another name.
- With a token, every request to the interface must have it, as a bearer or in a cookie.
- A request that changes something must come from this server's own page, or from no page at all: browsers
  state the origin of a request (cross-site request forgery).
- A body is refused as soon as it is larger than it may be, whatever its headers state, and if it stops.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import ExitStack
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kmdx.web.jobs import Queue, QueueFull

API, UPLOAD, LOGIN = "/api", "/api/jobs", "/api/login"
COOKIE = "kmdx_token"
OWN_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
SMALL = 2**16  # bytes of a body that is not an upload, and of an upload besides its file

HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-store",
}
"""Headers of every answer that does not state its own."""
DOCS = "/docs"
DOCS_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'"
)
"""Of the page of the interface, whose scripts are partly in the page; it shows nothing from strangers."""


@dataclass(frozen=True)
class Access:
    """Who may use the server."""

    token: str | None = None
    """None if everybody on this machine may."""
    names: frozenset[str] = OWN_NAMES
    """The names of this machine that a request may be sent to without a token."""

    def is_token(self, text: str) -> bool:
        """Whether a text is the token, compared in constant time."""
        return self.token is not None and secrets.compare_digest(text.encode(), self.token.encode())


class Guard:
    """ASGI middleware that refuses requests, and adds headers to answers."""

    def __init__(self, app: ASGIApp, access: Access, queue: Queue) -> None:
        self.app, self.access, self.queue = app, access, queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = MutableHeaders(scope=message)
                if scope["path"] == DOCS:
                    found["content-security-policy"] = DOCS_POLICY
                for name, value in HEADERS.items():
                    found.setdefault(name, value)
            await send(message)

        with ExitStack() as stack:
            try:
                self._check(scope)
                is_upload = scope["method"] == "POST" and scope["path"] == UPLOAD
                most = SMALL
                if is_upload:
                    most += self.queue.limits.size
                    stack.enter_context(self.queue.room())
                self._check_length(Headers(scope=scope), most)
            except QueueFull as error:
                await refuse(429, str(error), {"retry-after": "60"})(scope, receive, answer)
            except HTTPException as error:
                headers = dict(error.headers or {})
                await refuse(error.status_code, error.detail, headers)(scope, receive, answer)
            else:
                limited = _limited(receive, most, self.queue.limits.patience)
                await self.app(scope, limited, answer)

    def _check(self, scope: Scope) -> None:
        """Raise :class:`HTTPException` if the request is not answered."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.access.token is None and _name(host) not in self.access.names:
            raise HTTPException(
                403,
                f"this server answers only to {', '.join(sorted(self.access.names))}, unless it has a token",
            )
        if scope["method"] not in SAFE:
            origin = headers.get("origin")
            is_foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
            if is_foreign or (origin is not None and not _is_from(origin, host)):
                raise HTTPException(403, "this request came from a page of another site")
        path = scope["path"]
        if self.access.token is not None and path.startswith(f"{API}/") and path != LOGIN:
            kind, _, bearer = headers.get("authorization", "").partition(" ")
            cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
            given = bearer.strip() if kind.lower() == "bearer" else cookie
            if not self.access.is_token(given):
                raise HTTPException(
                    401,
                    "this server needs its token: Authorization: Bearer TOKEN",
                    {"www-authenticate": "Bearer"},
                )

    def _check_length(self, headers: Headers, most: int) -> None:
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdecimal() and int(length[:20]) > most:
            raise too_large(most)


def _limited(receive: Receive, most: int, patience: float) -> Receive:
    """Receive a body of at most ``most`` bytes, whose parts are at most ``patience`` seconds apart."""
    size, is_complete = 0, False

    async def limited() -> Message:
        nonlocal size, is_complete
        if is_complete:  # only the end of the connection is waited for
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), patience)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"nothing was received for {patience:g} s") from None
        size += len(message.get("body", b""))
        is_complete = not message.get("more_body", False)
        if size > most:
            raise too_large(most)
        return message

    return limited


def too_large(most: int) -> HTTPException:
    """The error for a body that is too large."""
    if most <= SMALL:
        return HTTPException(413, f"the request is larger than {most} bytes")
    return HTTPException(
        413, f"the file is larger than {(most - SMALL) / 1e6:g} MB, the most that this server takes"
    )


def refuse(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An answer that states an error."""
    return JSONResponse({"detail": detail}, status, headers)


def _name(host: str) -> str:
    """The host name in a Host header, without its port; empty if it is malformed."""
    try:
        return "" if "@" in host else (urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return ""


def _is_from(origin: str, host: str) -> bool:
    """Whether the origin of a request is the host that it was sent to."""
    try:
        return urlsplit(origin).netloc.lower() == host.lower() != ""
    except ValueError:
        return False
