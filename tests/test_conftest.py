"""The guards of conftest.py guard."""

import os
import socket
import threading

import pytest


def test_another_host_is_out_of_reach() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"asked the network for '192\.0\.2\.1'"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(pytest.fail.Exception, match=r"asked the network for 'example\.org'"):
        socket.getaddrinfo("example.org", 443)


def test_loopback_is_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer = threading.Thread(target=lambda: server.accept()[0].close())
        answer.start()
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            assert client.recv(1) == b""
        answer.join()


def test_one_thread_and_no_hub() -> None:
    import torch

    assert torch.get_num_threads() == 1
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("turn", [1, 2])
def test_every_test_starts_from_the_same_seed(turn: int) -> None:
    import torch

    assert torch.initial_seed() == 0
    torch.manual_seed(turn)
