"""Order of the requests that need the model: one runs, few wait, and their uploads fit into memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator

from tokenmerge.tools.explore.limits import Limits


class BusyError(Exception):
    """Error for a request that finds no room; its message is one sentence for the page."""


class Queue:
    """Requests in progress.

    Waiting requests are coroutines and hold no thread, so the server answers all other requests meanwhile.

    Args:
        limits: the limits.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._turn = asyncio.Lock()
        self._waiting: Counter[str] = Counter()
        self._held = 0

    @contextlib.asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait for the model, in the order of arrival.

        Args:
            client: address of the client.

        Raises:
            BusyError: if too many wait already, of all clients or of this one.
        """
        if self._waiting.total() >= self._limits.waiting or self._waiting[client] >= self._limits.waiting_each:
            raise BusyError("the model is busy, and too many requests wait for it: try again in some seconds")
        self._waiting[client] += 1
        try:
            async with self._turn:
                yield
        finally:
            self._waiting[client] -= 1
            if not self._waiting[client]:
                del self._waiting[client]

    @contextlib.contextmanager
    def upload(self) -> Iterator[Upload]:
        """Account for an upload, until it is not needed any more."""
        one = Upload(self)
        try:
            yield one
        finally:
            self._held -= one.size

    def _grow(self, size: int) -> None:
        if self._held + size > self._limits.memory:
            raise BusyError("too many files are being sent here: try again in some seconds")
        self._held += size


class Upload:
    """Bytes of one upload so far."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._parts: list[bytes] = []
        self.size = 0

    def add(self, part: bytes) -> None:
        """Add a part.

        Raises:
            BusyError: if all uploads together are too large.
        """
        self._queue._grow(len(part))
        self.size += len(part)
        self._parts.append(part)

    def bytes(self) -> bytes:
        """Return all parts as one; they are kept no longer."""
        whole = b"".join(self._parts)
        self._parts = []
        return whole
