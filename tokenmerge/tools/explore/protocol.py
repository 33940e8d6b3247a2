"""HTTP connections that end when their client stalls, so that slow or hostile clients cannot block the others.

uvicorn's own protocol reads and writes HTTP; the class here adds timers and a cap on connections. uvicorn's cap
(`limit_concurrency`) would refuse everybody as long as anybody holds enough connections.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tokenmerge.tools.explore.limits import Limits


class GuardedProtocol(H11Protocol):
    """HTTP/1.1 connection with limits on the time that a client takes, and on the number of its connections."""

    limits: ClassVar[Limits] = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head: asyncio.TimerHandle | None = None
        self._flush: asyncio.TimerHandle | None = None
        self._flush_until = self._since = 0.0

    @property
    def waits(self) -> bool:
        """Whether no request is in progress."""
        return self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer of the request header, and close another connection if there are too many."""
        super().connection_made(transport)
        self._since = self.loop.time()
        self._head = self.loop.call_later(self.limits.head, self._end)
        self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        for timer in (self._head, self._flush, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self._set_timer()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._since = self.loop.time()
        self._set_timer()
        if self.transport.get_write_buffer_size():
            self._watch_flush()

    def pause_writing(self) -> None:
        """Stop the answer until the client has read more of it."""
        super().pause_writing()
        self._watch_flush()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection without a request, unless it still fetches its last answer."""
        if self.transport.get_write_buffer_size():
            self._watch_flush()
        else:
            super().timeout_keep_alive_handler()

    def _set_timer(self) -> None:
        """Start the timer that the state of the connection needs; a running one goes on, so that no trickle extends it."""
        answered = self.cycle is not None and self.cycle.response_complete
        if self.waits:
            wanted = None if self.timeout_keep_alive_task is not None else self.limits.head
        elif answered and self.conn.their_state is h11.SEND_BODY:
            wanted = self.limits.pause  # the rest of a refused upload is read, because a reset would hide the answer
        elif self._head is not None:
            self._head.cancel()
            self._head = wanted = None
        else:
            wanted = None
        if wanted is not None and self._head is None:
            self._head = self.loop.call_later(wanted, self._end)

    def _end(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()

    def _watch_flush(self) -> None:
        """Drop the client if it does not go on reading its answer."""
        if self._flush is None:
            self._flush_until = self.loop.time() + self.limits.whole
            self._flush = self.loop.call_later(
                self.limits.pause, self._check_flush, self.transport.get_write_buffer_size()
            )

    def _check_flush(self, before: int) -> None:
        self._flush = None
        left = self.transport.get_write_buffer_size()
        if left >= before > 0 or (left and self.loop.time() > self._flush_until):
            self.transport.abort()
        elif left:
            self._flush = self.loop.call_later(self.limits.pause, self._check_flush, left)
        elif self.waits and self.timeout_keep_alive_task is not None:
            self._set_keep_alive()

    def _set_keep_alive(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.limits.idle, self.timeout_keep_alive_handler)

    def _make_room(self) -> None:
        """Close the connection that has waited longest, of this address or of all, if there are too many; refuse this one if none waits."""
        others = [one for one in self.connections if isinstance(one, GuardedProtocol) and one is not self]
        others = [one for one in others if not one.transport.is_closing()]
        mine = [one for one in others if one.client and self.client and one.client[0] == self.client[0]]
        if len(mine) >= self.limits.connections_each:
            crowd = mine
        elif len(others) >= self.limits.connections:
            crowd = others
        else:
            return
        waiting = [one for one in crowd if one.waits]
        if waiting:
            min(waiting, key=lambda one: one._since)._end()
        else:
            self._refuse()

    def _refuse(self) -> None:
        headers = [(b"content-type", b"text/plain"), (b"retry-after", b"5"), (b"connection", b"close")]
        answer = h11.Response(status_code=503, headers=headers, reason=b"Service Unavailable")
        text = h11.Data(data=b"too many connections are open: try again in some seconds")
        for event in (answer, text, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
