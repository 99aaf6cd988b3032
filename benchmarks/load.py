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
from typing import Any
from urllib.parse import urlsplit


class Driver:
    """One run."""

    def __init__(self, given: dict[str, Any]) -> None:
        where = urlsplit(given["url"])
        if where.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise SystemExit(f"{given['url']}: this driver loads servers on this machine only")
        self.host, self.port, self.given = where.hostname, where.port, given
        self.first: list[float] = []
        self.between: list[float] = []
        self.whole: list[float] = []
        self.statuses: dict[str, int] = {}

    async def one(self, request: dict[str, Any]) -> None:
        """One streamed completion, over a connection of its own."""
        more = {"max_tokens": self.given["new"], "ignore_eos": True, "logprobs": 0, "stream": True}
        body = json.dumps(request | more).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        begun = time.perf_counter()
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        status = (await reader.readline()).split(b" ")[1].decode()
        self.statuses[status] = self.statuses.get(status, 0) + 1
        last = 0.0
        while line := await reader.readline():
            if not line.startswith(b'data: {"id"') or b'"finish_reason": null' not in line:
                continue
            now = time.perf_counter()
            (self.between if last else self.first).append(now - (last or begun))
            last = now
        writer.close()
        self.whole.append(time.perf_counter() - begun)

    async def run(self) -> dict[str, Any]:
        """All requests."""
        begun, todo = time.perf_counter(), list(reversed(self.given["requests"]))
        until = begun + self.given["seconds"]
        if self.given["rate"]:
            source, tasks = random.Random(0), []
            while todo and time.perf_counter() < until:
                tasks.append(asyncio.create_task(self.one(todo.pop())))
                await asyncio.sleep(source.expovariate(self.given["rate"]))
            await asyncio.gather(*tasks)
        else:

            async def client() -> None:
                while todo and time.perf_counter() < until:
                    await self.one(todo.pop())

            await asyncio.gather(*(client() for _ in range(self.given["clients"])))
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "done": len(self.whole), "first": self.first, "between": self.between,
                "whole": self.whole, "statuses": self.statuses}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(asyncio.run(Driver(json.load(sys.stdin)).run())))
