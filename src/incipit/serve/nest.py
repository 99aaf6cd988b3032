"""Forks the processes of executors from one that has the model in memory and no threads.

A process with threads must not be forked, and one that reads the model anew takes long. So the server, once the model
is there, forks a nest, which does nothing but fork again when it is asked; the weights stand in memory once for all of
them. Only one executor lives at a time: a new one takes the place of what has failed or hangs.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
from functools import partial
from typing import Any

import torch

from incipit.backbones import Backbone
from incipit.serve import apart

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOST = 70  # exit status of a server whose nest is gone: EX_SOFTWARE
LONG = 60.0  # seconds after which a nest that says nothing is gone


def possible(device: str) -> bool:
    """Whether executors can be forked: on Linux, from the main thread, where the model is computed on the processor."""
    main = threading.current_thread() is threading.main_thread()
    return sys.platform == "linux" and device == "cpu" and main


class Nest:
    """Make it before threads are started, with torch set to one thread since it was imported.

    threads: that an executor computes with. sizes: see the executors.
    """

    def __init__(self, backbone: Backbone, threads: int, **sizes: Any) -> None:
        self.backbone, self.sizes = backbone, sizes
        self._control, theirs = socket.socketpair()
        self._control.settimeout(LONG)
        gc.freeze()  # what is there now is no garbage: looking for some would copy the pages that processes share
        self._pid = os.fork()
        if not self._pid:
            _alone(partial(_sit, theirs, backbone, threads, sizes), keep=theirs.fileno())
        theirs.close()

    def executor(self) -> apart.Apart:
        """A new one; the one before is killed, so that a thread which waits for it hears so. Raises EngineDown where it
        does not come up."""
        near, far = socket.socketpair()
        with far:
            try:
                socket.send_fds(self._control, [b"."], [far.fileno()])
                said = self._control.recv(32)
            except OSError:
                said = b""
        if not said:  # a server that can make no more engines is replaced as a whole by who keeps it
            logging.getLogger("incipit.serve").error("the process that forks engines is gone")
            os._exit(LOST)
        return apart.Apart(self.backbone, apart.Line(near), int(said), **self.sizes)

    def close(self) -> None:
        """End all of its processes."""
        self._control.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def _alone(do: Any, keep: int) -> None:
    """Run something in a process that was just forked, which ends with it; only `keep` stays open of what it was given.

    It ends when the server does, which it learns from its sockets: signals to a whole group are for the server.
    """
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for sig in SIGNALS:
            signal.signal(sig, signal.SIG_IGN)
        os.closerange(3, keep)
        os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX"))
        do()
        status = 0
    finally:
        os._exit(status)


def _sit(control: socket.socket, backbone: Backbone, threads: int, sizes: dict[str, Any]) -> None:
    """Fork when asked, until the server is gone."""
    child = 0
    while True:
        data, sockets, _, _ = socket.recv_fds(control, 16, 1)
        if child:
            os.kill(child, signal.SIGKILL)  # it is there until somebody has waited for it
            os.waitpid(child, 0)
        if not data:
            return
        (far,) = sockets
        child = os.fork()
        if not child:
            _alone(partial(_work, far, backbone, threads, sizes), keep=far)
        os.close(far)
        control.sendall(str(child).encode())


def _work(far: int, backbone: Backbone, threads: int, sizes: dict[str, Any]) -> None:
    torch.set_num_threads(threads)
    apart.answer(apart.Line(socket.socket(fileno=far)), backbone, **sizes)
