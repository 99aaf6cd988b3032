"""Over a real socket: the stock openai client, clients that leave, huge bodies, draining."""

import http.client
import json
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from incipit.errors import ServeError
from incipit.serve.asks import Delta
from incipit.serve.http.app import Options
from incipit.serve.http.gate import Limits
from incipit.serve.http.keys import Keys
from incipit.serve.http.server import listening

PATIENCE = 60
KEY = "0123456789abcdef"


@pytest.fixture
def served(make: Any, listen: Any) -> Iterator[tuple[Any, str]]:
    site = make()
    with listen(site.gate) as (url, _):
        yield site, url


# -- the stock client ------------------------------------------------------------------------------------------


@pytest.fixture
def client(make: Any, listen: Any) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # while a stranger's package is imported
        openai = pytest.importorskip("openai")
    site = make(Options(keys=Keys.of([KEY], "keys")))
    with (
        listen(site.gate) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as found,
    ):
        found.site, found.errors = site, openai
        yield found


def test_the_stock_client_completes(client: Any) -> None:
    reply = client.completions.create(model="mood", prompt=["a", "b"], max_tokens=2, logprobs=0)
    assert [choice.text for choice in reply.choices] == ["w0 w1 .", "w0 w1 ."]
    assert reply.usage.completion_tokens == 4 and reply.choices[0].logprobs.token_logprobs == [0.0, -1.0]
    assert reply._request_id and reply.system_fingerprint.startswith("mood@")
    parts = client.completions.create(model="mood", prompt="a", max_tokens=2, stream=True)
    assert "".join(part.choices[0].text for part in parts) == "w0 w1 ."


def test_the_stock_client_chats(client: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    reply = client.chat.completions.create(
        model="talk", messages=messages, max_completion_tokens=1, temperature=0.5
    )
    assert reply.choices[0].message.content == "w0 ."
    options = {"include_usage": True}
    parts = list(
        client.chat.completions.create(
            model="talk", messages=messages, max_tokens=2, stream=True, stream_options=options
        )
    )
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == "w0 w1 ."
    assert parts[-1].usage.completion_tokens == 2


def test_the_stock_client_goes_on_with_what_it_was_answered(client: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    said = client.chat.completions.create(model="talk", messages=messages, max_tokens=1).choices[0].message
    for answer in (said, said.model_dump()):  # both are what its users write
        more = [*messages, answer, {"role": "user", "content": "and now?"}]
        reply = client.chat.completions.create(model="talk", messages=more, max_tokens=1)
        assert reply.choices[0].message.content == "w0 ."
    turns = [*messages, {"role": "assistant", "content": "w0 ."}, {"role": "user", "content": "and now?"}]
    assert client.site.engine.tickets[-1].ask.ids == client.site.engine.backbone.encode_asked(turns).input_ids


def test_the_stock_client_lists(client: Any) -> None:
    assert {model.id for model in client.models.list()} >= {"llama", "mood", "best"}
    assert client.models.retrieve("mood").parent == "llama"


def test_the_stock_client_knows_our_errors(client: Any) -> None:
    errors = client.errors
    with pytest.raises(errors.NotFoundError, match="did you mean 'mood'"):
        client.completions.create(model="moood", prompt="x")
    with pytest.raises(errors.UnprocessableEntityError) as caught:
        client.completions.create(model="mood", prompt="x", max_tokens=0)
    assert caught.value.param == "max_tokens" and caught.value.code == "invalid_value"
    with pytest.raises(errors.BadRequestError, match="penalties"):
        client.completions.create(model="mood", prompt="x", presence_penalty=1)
    with pytest.raises(errors.AuthenticationError):
        client.with_options(api_key="x").models.list()


# -- clients that leave ----------------------------------------------------------------------------------------


def opened(url: str, **body: Any) -> socket.socket:
    """A request that was sent, on its socket."""
    where = urlsplit(url)
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    found = socket.create_connection((where.hostname, where.port), timeout=PATIENCE)
    found.sendall(head.encode() + data)
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_his_rows(served: Any, stream: bool) -> None:
    site, url = served
    site.engine.by_hand = True
    connection = opened(url, model="mood", prompt=["x", "y"], stream=stream)
    site.engine.wait(lambda: len(site.engine.tickets) == 2)
    if stream:
        site.engine.tickets[0].put(Delta((20,), "one"))
        assert b"one" in read_until(connection, b"one")
    connection.close()
    site.engine.wait(lambda: len(site.engine.cancelled) == 2)
    site.engine.by_hand = False
    assert (
        httpx.post(
            f"{url}/v1/completions", json={"model": "mood", "prompt": "x"}, timeout=PATIENCE
        ).status_code
        == 200
    )


def test_who_leaves_before_the_body_is_there(served: Any) -> None:
    site, url = served
    where = urlsplit(url)
    connection = socket.create_connection((where.hostname, where.port), timeout=PATIENCE)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    connection.close()
    assert httpx.get(f"{url}/healthz", timeout=PATIENCE).status_code == 200
    assert not site.engine.tickets


def read_until(connection: socket.socket, end: bytes) -> bytes:
    found = b""
    while end not in found:
        part = connection.recv(65536)
        assert part, found
        found += part
    return found


# -- bodies that nobody should send ----------------------------------------------------------------------------


def test_a_hundred_megabytes(make: Any, listen: Any) -> None:
    with listen(make(Options(limits=Limits(body_seconds=600))).gate) as (url, _):
        hundred_megabytes(url)


def hundred_megabytes(url: str) -> None:
    where = urlsplit(url)
    connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=PATIENCE)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(100_000_000))
    connection.endheaders()
    part = b" " * 1_000_000
    for _ in range(100):
        connection.send(part)
    reply = connection.getresponse()
    assert reply.status == 413 and json.loads(reply.read())["error"]["code"] == "body_too_large"
    connection.close()


def test_who_asks_first_need_not_send(served: Any) -> None:
    _, url = served
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=PATIENCE) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 100000000\r\n\r\n"
        connection.sendall(head.encode())
        assert read_until(connection, b"\r\n").startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "sent",
    [b"\0\1\2\r\n\r\n", b"GET /\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n"],
)
def test_what_is_no_http(served: Any, sent: bytes) -> None:
    _, url = served
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=PATIENCE) as connection:
        connection.sendall(sent)
        assert b" 400 " in connection.recv(4096)[:20]
    assert httpx.get(f"{url}/healthz", timeout=PATIENCE).status_code == 200


def test_a_head_that_does_not_end(make: Any, listen: Any) -> None:
    """64 KB of it are read, whichever parser is installed."""
    with listen(make().gate) as (url, _):
        where = urlsplit(url)
        with socket.create_connection((where.hostname, where.port), timeout=PATIENCE) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nx: " + b"a" * 200_000)
            assert b" 400 " in connection.recv(4096)[:20]
        assert httpx.get(f"{url}/healthz", timeout=PATIENCE).status_code == 200


# -- the end ---------------------------------------------------------------------------------------------------


def test_draining(make: Any, listen: Any) -> None:
    site = make()
    site.engine.by_hand = True
    with listen(site.gate) as (url, server):
        connection = opened(url, model="mood", prompt="x", max_tokens=1)
        site.engine.wait(lambda: len(site.engine.tickets) == 1)
        server.drain()
        with httpx.Client(timeout=PATIENCE) as client:
            assert client.get(f"{url}/readyz").status_code == 503
            late = client.post(f"{url}/v1/completions", json={"model": "mood", "prompt": "x"})
        assert late.status_code == 503 and late.headers["retry-after"] == "1"
        site.engine.answer(site.engine.tickets[0])
        assert b" 200 " in read_until(connection, b"w0 .")[:20]
        connection.close()
        for thread in threading.enumerate():  # the server goes by itself now
            if getattr(getattr(thread, "_target", None), "__self__", None) is server:
                thread.join(PATIENCE)
                assert not thread.is_alive()
    assert site.engine.stopped


def test_the_grace_is_over(make: Any, listen: Any) -> None:
    site = make()
    site.engine.by_hand = True
    with listen(site.gate, grace=0.0) as (url, server):
        connection = opened(url, model="mood", prompt="x")
        site.engine.wait(lambda: len(site.engine.tickets) == 1)
        server.drain()
        said = read_until(connection, b"\r\n\r\n")
        assert b" 503 " in said[:20]
        connection.close()


def test_an_address_that_is_taken() -> None:
    with listening("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(
            ServeError, match=r"cannot listen on 127.0.0.1:\d+: .*; choose another --host or --port"
        ):
            listening("127.0.0.1", first.getsockname()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_the_table_of_descriptors_is_long_from_the_start() -> None:
    """So that none is copied under load; and no descriptor stays open."""
    told = "print(size(), len(os.listdir('/proc/self/fd')))"
    code = f"""
import os
from incipit.serve.http.server import widen
def size():
    with open("/proc/self/status") as status:
        return next(line.split()[1] for line in status if line.startswith("FDSize"))
{told}
widen(2048)
{told}
widen(10**9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, open_before, after, open_after = map(int, done.stdout.split())
    assert before < 2048 <= after and open_before == open_after
