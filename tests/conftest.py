"""What holds for every test: no network, no hub, no cache of the user, one thread, known seeds."""

import os
import socket
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

# Before anything imports torch or transformers: both read these once.
_CACHE = tempfile.TemporaryDirectory(prefix="incipit-tests-")
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HOME=_CACHE.name,  # a model that somebody downloaded once must not make a test pass
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)
os.environ.pop("HF_DATASETS_CACHE", None)

hypothesis.settings.register_profile("house", deadline=None)  # an example that waits for a core is no fault
hypothesis.settings.load_profile("house")

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """A socket to another host fails the test; pytest.fail passes through `except Exception`."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(host: object) -> None:
        if isinstance(host, bytes):
            host = host.decode()
        if host is not None and host not in LOOPBACK:
            pytest.fail(f"a test asked the network for {host!r}")

    def guarded_connect(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple):  # not the path of a Unix socket
            check(address[0])
        return connect(self, address)  # type: ignore[arg-type]

    def guarded_connect_ex(self: socket.socket, address: object) -> int:
        if isinstance(address, tuple):
            check(address[0])
        return connect_ex(self, address)  # type: ignore[arg-type]

    def guarded_getaddrinfo(host: object, *rest: object, **named: object) -> object:
        check(host)
        return getaddrinfo(host, *rest, **named)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> None:
    """The same sums in the same order on every machine, and the same numbers whichever test ran before."""
    import torch  # after the environment above, and not before a first test needs it

    torch.set_num_threads(1)
    torch.manual_seed(0)
