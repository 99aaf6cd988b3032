"""A load driver for a server on this machine, with the standard library alone: python -m benchmarks.load (reads JSON).

Standard input: {"url", "requests": [{"model", "prompt": [ids]}], "new", "clients", "rate", "seconds"}. rate 0: a closed
loop, each of `clients` asks again as soon as it is answered. Otherwise an open loop: requests come at random times
(Poisson, seeded) at `rate` a second, whether or not those before are answered. Both end after the given requests; none
is begun after `seconds`. Standard output: seconds, first (to the first token) and between (two tokens) of all requests,
statuses.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
PATIENCE = 120.0  # seconds until a reply counts as lost
LOST, LEFT = 0, -1  # in place of a status: no whole reply came; we went away ourselves


@dataclass
class Reply:
    """What came back. tokens: when each piece of a stream came, seconds from the start."""

    status: int = LOST
    seconds: float = 0.0
    tokens: list[float] = field(default_factory=list)
    body: bytes = b""

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Address:
    """One server on this machine; every request has a connection of its own."""

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        if where.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise SystemExit(f"{url}: this driver loads servers on this machine only")
        self.host, self.port = where.hostname, where.port

    async def ask(self, path: str, body: Any = None, *, leave: float = PATIENCE, key: str = "") -> Reply:
        """POST a body as JSON, or GET. leave: seconds after which the client goes away."""
        reply, begun = Reply(), time.perf_counter()
        try:
            async with asyncio.timeout(leave):
                await self._ask(reply, begun, path, body, key)
        except TimeoutError:  # an OSError too
            reply.status = LEFT
        except (OSError, IndexError, asyncio.IncompleteReadError):
            reply.status = LOST
        reply.seconds = time.perf_counter() - begun
        return reply

    async def _ask(self, reply: Reply, begun: float, path: str, body: Any, key: str) -> None:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(self._head(path, body, key))
            status = int((await reader.readline()).split(b" ")[1])
            length, lines = 0, list[bytes]()
            while (line := await reader.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            if length:
                reply.body = await reader.readexactly(length)
                reply.status = status
                return
            while line := await reader.readline():
                if line.startswith(b"data: "):
                    lines.append(line)
                    if b'"finish_reason": null' in line:
                        reply.tokens.append(time.perf_counter() - begun)
            reply.body = b"".join(lines)
            reply.status = status if lines and lines[-1].startswith(b"data: [DONE]") else LOST
        finally:
            writer.close()

    def _head(self, path: str, body: Any, key: str) -> bytes:
        verb, data = ("GET", b"") if body is None else ("POST", json.dumps(body).encode())
        if path.startswith("/v1/aliases/"):
            verb = "PUT"
        more = f"Authorization: Bearer {key}\r\n" if key else ""
        return (
            f"{verb} {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n{more}"
            f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        ).encode() + data


async def closed(jobs: Sequence[Callable[[], Awaitable[T]]], clients: int, seconds: float) -> list[T]:
    """Each client begins the next job when its last one is done; none is begun after `seconds`."""
    todo, found, until = list(reversed(jobs)), list[T](), time.perf_counter() + seconds

    async def client() -> None:
        while todo and time.perf_counter() < until:
            found.append(await todo.pop()())

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


async def opened(
    jobs: Sequence[Callable[[], Awaitable[T]]], rate: float, seconds: float, seed: int = 0
) -> list[T]:
    """Jobs begin at random times, `rate` a second, whoever is done; none is begun after `seconds`."""
    source, tasks = random.Random(seed), list[asyncio.Task[T]]()
    begun = due = time.perf_counter()
    for job in jobs:
        due += source.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        if time.perf_counter() > begun + seconds:
            break
        tasks.append(asyncio.ensure_future(job()))
    return list(await asyncio.gather(*tasks))


class Driver:
    """One run over streamed completions."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.address, self.given = Address(given["url"]), given

    async def run(self) -> dict[str, Any]:
        """All requests."""
        more = {"max_tokens": self.given["new"], "ignore_eos": True, "logprobs": 0, "stream": True}
        bodies = [request | more for request in self.given["requests"]]
        jobs = [lambda body=body: self.address.ask("/v1/completions", body) for body in bodies]
        begun, rate, seconds = time.perf_counter(), self.given["rate"], self.given["seconds"]
        replies = await (
            opened(jobs, rate, seconds) if rate else closed(jobs, self.given["clients"], seconds)
        )
        statuses: dict[str, int] = {}
        for reply in replies:
            statuses[str(reply.status)] = statuses.get(str(reply.status), 0) + 1
        return {
            "seconds": time.perf_counter() - begun,
            "done": len(replies),
            "first": [r.tokens[0] for r in replies if r.tokens],
            "between": [b - a for r in replies for a, b in zip(r.tokens, r.tokens[1:], strict=False)],
            "whole": [r.seconds for r in replies],
            "statuses": statuses,
        }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(Driver(json.load(sys.stdin)).run())))
