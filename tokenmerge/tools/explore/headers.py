"""Security headers of every answer, and the content policy of a page."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable, MutableMapping
from html.parser import HTMLParser
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]

STRICT = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""Policy of answers that load nothing."""
HEADERS = {
    "Content-Security-Policy": STRICT,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class _Scripts(HTMLParser):
    """Collector of the policy in a page's meta element, and of the texts of its inline scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.policy = ""
        self.scripts: list[str] = []
        self._inside = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "meta" and (given.get("http-equiv") or "").lower() == "content-security-policy":
            self.policy = given.get("content") or ""
        if tag == "script" and given.get("type") in (None, "", "module", "text/javascript"):
            self._inside = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data


def policy_of(page: str) -> str:
    """Return the content policy to send with a page: its own, in which only the scripts that it holds may run.

    The page's own policy allows any inline script, because a file on a disk has no server that names them by their hashes.
    """
    found = _Scripts(page)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") for text in found.scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"
    if not found.policy:
        return f"{STRICT}; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'"
    return re.sub(r"script-src [^;]*", f"script-src {allowed}", found.policy) + "; frame-ancestors 'none'"


class Shield:
    """ASGI application around another one: it refuses long request headers, and sends `HEADERS` with every answer.

    Args:
        app: the application.
        most: bytes of the request line and all headers.
        refuse: application that answers a request with longer ones.
    """

    def __init__(self, app: Any, most: int, refuse: Any) -> None:
        self._app, self._most, self._refuse = app, most, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def shielded(message: Scope) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", ()))
                names = {name.lower() for name, _ in given}
                encoded = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": given + [one for one in encoded if one[0] not in names]}
            await send(message)

        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        size += len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
        await (self._refuse if size > self._most else self._app)(scope, receive, shielded)
