"""The process that serves is replaced when it dies or hangs, also where it holds the interpreter's lock."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from incipit.serve.http import keeper

PATIENCE = 90  # seconds; a bound for a machine that is frozen
SERVER = """
import ctypes, os, re, select, signal, socket, sys, time
from incipit.serve.http import keeper

sock = socket.create_server(("127.0.0.1", 0))
print(sock.getsockname()[1], flush=True)
beat = keeper.keep(sock)
while beat.restarts and not os.path.exists(f"{sys.argv[1]}/{beat.restarts}") and os.getppid() != 1:
    time.sleep(0.01)
if beat.restarts == 1:
    os._exit(3)  # it does not come up at the first attempt
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
beat.listens()
while True:
    select.select([sock], (), ())
    try:
        connection, _ = sock.accept()
    except BlockingIOError:  # the keeper was faster
        continue
    head = connection.recv(4096)
    if b"/spin" in head:
        re.match("(a+)+$", "a" * 64 + "b")  # so does this, and takes the processor
    if b"/hang" in head:
        ctypes.PyDLL(None).sleep(1000)  # it holds the interpreter's lock
    connection.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n%d %d" % (os.getpid(), beat.restarts))
    connection.close()
"""


class Kept:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = os.environ | {"PYTHONPATH": str(Path(keeper.__file__).parents[3])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def ask(self, path: str = "/", body: bytes = b"") -> bytes:
        """The whole reply; empty where none comes."""
        head = f"POST {path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        found = b""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as connection:
                connection.sendall(head + body)
                while part := connection.recv(65536):
                    found += part
        except OSError:
            return b""
        return found

    def until(self, status: bytes) -> list[bytes]:
        """Words of the first reply with a status."""
        pause = threading.Event()
        for _ in range(PATIENCE * 50):
            found = self.ask()
            assert found[9:12] in (b"", b"200", b"503")
            if found[9:12] == status:
                return found.split(b"\r\n\r\n")[1].split()
            pause.wait(0.02)
        raise AssertionError(f"no {status!r}")


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    found = Kept(tmp_path)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.communicate(timeout=PATIENCE)


def test_a_server_that_fails_is_replaced(kept: Kept) -> None:
    first, count = kept.until(b"200")
    assert count == b"0" and int(first) != kept.process.pid
    assert kept.ask("/hang") == b""  # who waited hears of it
    kept.until(b"503")  # nobody serves yet: the keeper answers
    (kept.folder / "1").touch()
    for restarts, harm in ((2, signal.SIGKILL), (3, signal.SIGSTOP), (4, None)):
        kept.until(b"503")
        said = kept.ask("/v1/completions", b"x" * 200_000)
        assert b"\r\nretry-after: 1\r\n" in said and b"503 Service Unavailable" in said
        assert json.loads(said.split(b"\r\n\r\n")[1])["error"]["code"] == "engine_down"
        assert b" 503 " in kept.ask("/readyz") and b" 200 " in kept.ask("/healthz")
        (kept.folder / str(restarts)).touch()
        second, count = kept.until(b"200")
        assert second != first and int(count) == restarts
        if harm is None:
            assert kept.ask("/spin") == b""
        else:
            os.kill(int(second), harm)
        first = second
    (kept.folder / "5").touch()
    assert int(kept.until(b"200")[1]) == 5 and kept.process.poll() is None
    kept.process.send_signal(signal.SIGTERM)
    assert kept.process.wait(PATIENCE) == 7  # that of the process that served


def test_nothing_is_tried_again_before_it_has_once_listened() -> None:
    program = "import socket, sys; from incipit.serve.http import keeper\n"
    program += "keeper.keep(socket.socket()); sys.exit('wrong')"
    environment = os.environ | {"PYTHONPATH": str(Path(keeper.__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, env=environment
    )
    assert done.returncode == 1 and done.stderr == "wrong\n"


def test_without_its_keeper_a_server_ends(kept: Kept) -> None:
    kept.until(b"200")
    kept.process.kill()
    assert kept.process.stdout is not None
    assert (
        kept.process.stdout.read() == ""
    )  # both processes had it open; a hang here fails by pytest's timeout


def test_what_keeps_holds_no_model() -> None:
    program = (
        "import sys; from incipit.cli import main, serve; from incipit.serve.http import keeper, keys, logs\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program + "print({'torch', 'transformers', 'fastapi'} & set(sys.modules))"],
        capture_output=True, text=True, timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": str(Path(keeper.__file__).parents[3])},
    )  # fmt: skip
    assert done.stdout == "set()\n", done.stderr


def test_a_signal_that_comes_while_there_is_no_process_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the end of one process and the beginning of the next."""

    def no_more() -> int:
        raise AssertionError("nobody may be started now")

    monkeypatch.setattr(os, "fork", no_more)
    with socket.socket() as sock:
        found = keeper.Keeper(sock)
        found._pass_on(signal.SIGTERM, None)
        with pytest.raises(SystemExit) as ended:
            found._fork()
    assert ended.value.code == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(keeper.SIGNALS)
