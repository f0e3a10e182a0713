"""What stands before the page and the API: who may ask, from which page, how much, and what a browser may run.

A page of another site must neither read answers nor make this machine work: names that only resolve to this machine are
refused (DNS rebinding), and so are requests that another site's page sends. Elsewhere than on this machine a token is
wanted, as a cookie or a header. No script runs but those of the package.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY = 1_000_000  # bytes of a request
COOKIE = "leaveout"
HERE = ("127.0.0.1", "localhost", "[::1]")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses what may not be asked, and adds the headers that bind a browser.

    token  None: only names of this machine are answered, whoever asks. Else whoever has the token, under any name, as
           another site's page has no cookie of this one
    """

    def __init__(self, app: ASGIApp, token: str | None = None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if (refused := self._refused(scope, headers)) is not None:
            await _answer(send, *refused)
            return
        given = self._given_token(scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = dict(HEADERS)
                if given:  # from now on the cookie says it, not the address
                    added["Set-Cookie"] = f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                pairs = [(name.lower().encode(), value.encode()) for name, value in added.items()]
                message = {**message, "headers": [*message.get("headers", []), *pairs]}
            await send(message)

        await self.app(scope, _limited(receive), guarded)

    def _refused(self, scope: Scope, headers: Mapping[str, str]) -> tuple[int, str] | None:
        """Status and reason, where a request is refused."""
        host = headers.get("host", "")
        if self.token is None and _name(host) not in HERE:
            return 421, "This page answers on 127.0.0.1 and localhost only: open it under one of these names."
        if self.token is not None and not self._knows_token(scope, headers):
            return 401, "A token is wanted: open the address that `leaveout serve` printed."
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and scope["path"].startswith("/api"):
            return 403, "Another site's page may not ask here."
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "Another site's page may not ask here."
        if scope["method"] == "POST" and headers.get("content-type", "").split(";")[0] != "application/json":
            return 415, "Send JSON, with the content type application/json."
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > BODY:
            return 413, f"The request is too long: send at most {BODY} bytes."
        return None

    def _given_token(self, scope: Scope) -> bool:
        """Whether the address holds the token."""
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        return self.token is not None and _same(given, self.token)

    def _knows_token(self, scope: Scope, headers: Mapping[str, str]) -> bool:
        assert self.token is not None
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        return (
            self._given_token(scope) or _same(cookie.value if cookie else "", self.token) or _same(bearer, self.token)
        )


def _name(host: str) -> str:
    """A Host header without its port."""
    name, _, port = host.rpartition(":")
    return name if name and port.isdecimal() else host


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _limited(receive: Receive) -> Receive:
    """What is received, up to BODY bytes; what is longer ends there, as no JSON."""
    got = 0

    async def limited() -> Message:
        nonlocal got
        message = await receive()
        got += len(message.get("body", b""))
        if got > BODY:
            return {"type": "http.request", "body": b"", "more_body": False}
        return message

    return limited


async def _answer(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    given = {"content-type": "application/json", "content-length": str(len(body)), **HEADERS}
    pairs = [(name.lower().encode(), value.encode()) for name, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
