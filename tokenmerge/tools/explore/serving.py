"""uvicorn with the explorer's limits."""

from __future__ import annotations

from typing import Any

from tokenmerge.tools.explore.limits import Limits
from tokenmerge.tools.packages import needed

_ENDING = 3
"""Seconds that requests in progress get after Ctrl+C."""


def make_server(app: Any, limits: Limits | None = None, **options: Any) -> Any:
    """Return a `uvicorn.Server` for an ASGI application.

    Args:
        app: the application.
        limits: the limits; `None` is the usual ones.
        options: further arguments of `uvicorn.Config`.

    Raises:
        InputError: if uvicorn is not installed.
    """
    uvicorn = needed("uvicorn", "explore needs it", "explore")
    from tokenmerge.tools.explore.protocol import GuardedProtocol

    limits = limits or Limits()
    config = uvicorn.Config(
        app,
        http=type("Guarded", (GuardedProtocol,), {"limits": limits}),
        ws="none",  # a client could turn its connection into a WebSocket otherwise, which has no timers
        lifespan="off",
        proxy_headers=False,  # anybody could claim another address in them
        server_header=False,
        log_level="warning",
        timeout_keep_alive=limits.idle,
        timeout_graceful_shutdown=_ENDING,
        h11_max_incomplete_event_size=limits.header,
        **options,
    )
    return uvicorn.Server(config)
