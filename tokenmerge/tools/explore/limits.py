"""Limits of the explorer's server: how long it waits for a client, and how much of it one client may hold."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one server, in seconds, bytes and numbers of connections or requests.

    Attributes:
        head: seconds from a connection, or from the first byte of a further request, to the whole request header.
        idle: seconds that a connection without a request stays open.
        pause: seconds without progress, after which an upload is ended, or a client that does not read its answer is dropped.
        whole: seconds of a whole upload, or of fetching a whole answer.
        header: bytes of the request line and all headers.
        memory: bytes of all uploads that are held at once.
        connections: open connections.
        connections_each: open connections of one address.
        waiting: requests that run or wait for the model.
        waiting_each: requests of one address among them.
    """

    head: float = 5
    idle: int = 5
    pause: float = 10
    whole: float = 120
    header: int = 16 * 2**10
    memory: int = 256 * 2**20
    connections: int = 256
    connections_each: int = 64
    waiting: int = 16
    waiting_each: int = 8
