"""uvicorn with a shutdown that loses nothing: SIGTERM -> not ready, running requests finish, new ones 503, exit 0."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Literal

import uvicorn

from incipit.serve.http import logs
from incipit.serve.http.gate import Gate
from incipit.serve.http.keeper import listening

__all__ = ["Server", "listening"]

KEPT_ALIVE = 75  # seconds that an idle connection stays open
LAST = 5  # seconds for answers that are on their way when the grace is over
DESCRIPTORS = 4096  # two for each of as many requests as are likely under way

HEAD = 65536  # bytes that the head of a request may have


def parser() -> type[asyncio.Protocol] | Literal["h11"]:
    """What reads HTTP: httptools where it is, bounded as h11 is by itself."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"

    class Bounded(HttpToolsProtocol):
        """An endless head and HTTP 0.9 get status 400."""

        in_head, head = False, 0

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.in_head:
                self.head += len(data)
                if self.head > HEAD:
                    self.in_head = False
                    self.send_400_response("The head of the request is too long.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.in_head, self.head = True, 0

        def on_headers_complete(self) -> None:
            self.in_head = False
            if self.parser.get_http_version() not in ("1.0", "1.1"):
                raise ValueError("no HTTP of these days")  # the parser's own error, and status 400
            super().on_headers_complete()

    return Bounded


def widen(count: int = DESCRIPTORS) -> None:
    """Have room for so many open descriptors from now on, or for as many as are allowed.

    Linux doubles a full table, and whoever opened one too many then waits, some 50 ms under load, until every processor
    has looked away from the old one: of a server that is all who ask it.
    """
    if sys.platform != "linux":
        return
    import fcntl  # Unix alone has these
    import resource

    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    top = count if allowed == resource.RLIM_INFINITY else min(count, allowed)
    with contextlib.suppress(OSError), socket.socket() as some:
        os.close(fcntl.fcntl(some, fcntl.F_DUPFD_CLOEXEC, top - 1))


class Server(uvicorn.Server):
    """Serves one Gate on one socket. grace: seconds that running requests get after the first signal.

    A second signal ends at once. told: called with host and port when the server listens.
    """

    def __init__(
        self, gate: Gate, *, grace: float = 30.0, told: Callable[[str, int], None] | None = None
    ) -> None:
        config = uvicorn.Config(
            gate, http=parser(), log_config=None, access_log=False, lifespan="on", server_header=False, ws="none",
            timeout_keep_alive=KEPT_ALIVE, timeout_graceful_shutdown=LAST,
        )  # fmt: skip
        super().__init__(config)
        self.gate, self.grace, self.told = gate, grace, told
        self._since: float | None = None

    def drain(self) -> None:
        """Take no more requests, and exit when the running ones have ended. From any thread."""
        if self._since is None:
            self._since = time.monotonic()
            self.gate.draining = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first drains, the second ends."""
        if self._since is not None:
            self.should_exit = self.force_exit = True
        self.drain()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own would raise the signal again at the end, and the exit status would not be 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and tell where."""
        widen()
        await super().startup(sockets)
        if self.started and self.told is not None:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self.told(host, port)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to exit."""
        done = await super().on_tick(counter)
        if self._since is None or done:
            return done
        waited = time.monotonic() - self._since
        if self.gate.active and waited < self.grace:
            return False
        logs.tell("drained", waited=round(waited, 3), left=self.gate.active)
        await asyncio.to_thread(self.gate.stop)  # who is still there is told so
        return True
