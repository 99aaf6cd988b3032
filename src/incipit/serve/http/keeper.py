"""Keeps a server's process: one that died or hangs is replaced, and clients are told so meanwhile.

The engine's watchdog (serve/engine.py) sees a step that hangs, as long as other threads of the process can run. What it
cannot see is seen from outside: a crash, the kernel's killer, code that holds the interpreter's lock. The process beats
ten times a second through a pipe; where that stops, it is killed and forked anew, from here, where no torch is loaded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from incipit.errors import ServeError
from incipit.serve.http import logs
from incipit.serve.silence import Silence

TICK = 0.1  # seconds between two beats, and between two looks
STUCK = 1.5  # seconds without a beat
BACK_OFF = (0.1, 5.0)  # seconds between attempts to come back: the first, and the longest
SIGNALS = (signal.SIGTERM, signal.SIGINT)
BEAT, LISTENS = b".", b"!"
WHY = "the server's process failed and is coming back"


class Beat:
    """The process that serves, towards its keeper. restarts: how many there were before it."""

    def __init__(self, pipe: int | None, restarts: int = 0) -> None:
        self._pipe, self.restarts = pipe, restarts

    def listens(self) -> None:
        """It takes connections now, and beats from now on."""
        if self._pipe is not None:
            os.write(self._pipe, LISTENS)
            threading.Thread(target=self._on, args=(self._pipe,), name="incipit-beat", daemon=True).start()

    def _on(self, pipe: int) -> None:
        pause = threading.Event()
        try:
            while not pause.wait(TICK):
                os.write(pipe, BEAT)
        except OSError:  # the keeper is gone: nobody would stop this process
            os.kill(os.getpid(), signal.SIGTERM)


def listening(host: str, port: int) -> socket.socket:
    """A bound socket; raises ServeError for an address that is taken or not ours. port 0: any free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ServeError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from error
    return found


def keep(sock: socket.socket) -> Beat:
    """Fork. Returns in the process that serves, as often as one is needed; the keeper itself ends with SystemExit.

    sock: bound; both processes have it, so that clients find somebody while the server is coming back. Call it before
    threads are started. Where there is no fork, or a thread calls it, the process serves unkept: only the main thread
    hears signals.
    """
    main = threading.current_thread() is threading.main_thread()
    return Keeper(sock).run() if main and hasattr(os, "fork") else Beat(None)


class Keeper:
    """One socket, one process at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.child, self.pipe = sock, 0, -1
        self.restarts, self.listens, self.asked = 0, False, 0
        self.silent = 0.0
        self._handlers: dict[int, Any] = {}

    def run(self) -> Beat:
        """See `keep`."""
        self._handlers = {s: signal.signal(s, self._pass_on) for s in SIGNALS}
        pause = BACK_OFF[0]
        while True:
            beat = self._fork()
            if beat is not None:
                return beat
            status, why = self._watch()
            if self.asked or not status or not (self.listens or self.restarts):
                raise SystemExit(status if status >= 0 else 128 - status)
            pause = BACK_OFF[0] if self.listens else min(2 * pause, BACK_OFF[1])
            self.restarts += 1
            logs.tell("restart", logging.ERROR, why=why or f"exit status {status}", restarts=self.restarts)
            self._turn_away(pause)

    def _pass_on(self, sig: int, _: object) -> None:
        """The first signal drains, the second ends at once; where nobody is there to hear it, by force."""
        deaf, self.asked = self.asked and self.silent > STUCK, sig
        if self.child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child, signal.SIGKILL if deaf else sig)

    def _fork(self) -> Beat | None:
        """A new process; None for the keeper. SystemExit where a signal came while there was none to hear it."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            if self.asked:
                raise SystemExit(0)
            read, write = os.pipe()
            child = os.fork()
            if not child:
                for sig, handler in self._handlers.items():
                    signal.signal(sig, handler)
                os.setpgid(0, 0)  # Ctrl-C is for the keeper, which passes it on once
                os.close(read)
                return Beat(write, self.restarts)
            self.child, self.pipe, self.listens = child, read, False
            os.close(write)
            return None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _watch(self) -> tuple[int, str]:
        """(the process's exit status, why it was killed; ""), when it has ended."""
        self.silent, silence, why = 0.0, Silence(2 * TICK), ""
        try:
            while True:
                came = self._came()
                passed = silence.look(self.child)
                if came or not self.listens:
                    self.silent = 0.0
                    silence.broken()
                else:
                    self.silent += passed
                ended, status = os.waitpid(self.child, os.WNOHANG)
                if ended:
                    self.child = 0
                    return os.waitstatus_to_exitcode(status), why
                if self.silent > STUCK and not why and not self.asked:  # a process that ends beats no more
                    why = f"no sign of life for {STUCK} s"
                    os.kill(self.child, signal.SIGKILL)
        finally:
            os.close(self.pipe)

    def _came(self) -> bool:
        """Wait a moment for beats; while nobody else listens, turn clients away."""
        read: list[int | socket.socket] = [self.pipe, *([self.sock] if self._alone else [])]
        found = select.select(read, (), (), TICK)[0]
        if self.sock in found:
            self._refuse()
        said = os.read(self.pipe, 4096) if self.pipe in found else b""
        if self.pipe in found and not said:
            time.sleep(TICK)  # its end is closed: the process is about to go
        self.listens = self.listens or LISTENS in said
        return bool(said)

    @property
    def _alone(self) -> bool:
        """Whether the socket listens, and this process is the only one that may answer."""
        return bool(self.restarts) and not self.listens

    def _turn_away(self, seconds: float) -> None:
        """Refuse for a while."""
        self.listens, until = False, time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self.asked:
            if select.select([self.sock], (), (), left)[0]:
                self._refuse()
        if self.asked:
            raise SystemExit(0)

    def _refuse(self) -> None:
        """Tell one client that there is no server just now."""
        self.sock.setblocking(False)
        with contextlib.suppress(OSError):
            connection, _ = self.sock.accept()
            with connection:
                connection.settimeout(2 * TICK)
                head = connection.recv(65536)
                connection.sendall(_answer(head))
                connection.shutdown(socket.SHUT_WR)
                for _ in _rest(connection):
                    pass


def _rest(connection: socket.socket) -> Iterator[bytes]:
    """What is still being sent, for a moment: to close before it is read would take the answer back."""
    until = time.monotonic() + 2 * TICK
    while time.monotonic() < until and (part := connection.recv(65536)):
        yield part


def _answer(head: bytes) -> bytes:
    """An HTTP reply to a request that begins so."""
    path = (head.split(b" ", 2) + [b"", b""])[1].split(b"?")[0]
    status, body = b"503 Service Unavailable", {"ready": False, "why": WHY}
    if path == b"/healthz":
        status, body = b"200 OK", {"ok": True}
    elif path != b"/readyz":
        error = {"message": f"{WHY}; try again", "type": "server_error", "param": None, "code": "engine_down"}
        body = {"error": error}
    data = json.dumps(body).encode()
    return (
        b"HTTP/1.1 "
        + status
        + b"\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
        b"content-length: " + str(len(data)).encode() + b"\r\n\r\n" + data
    )
