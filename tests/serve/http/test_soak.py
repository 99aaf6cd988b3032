"""The short form of `make soak`: the same parts, few requests, a tiny model; counts decide, no clock does."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from benchmarks import soak
from benchmarks.load import LEFT
from benchmarks.soak_server import library, percentile, served, slope

from incipit.backbones import load, tiny

SIZES = soak.Sizes(requests=200, aborts=100, seconds=1.0, swaps=6, new=4, turns=1)


@pytest.mark.slow
def test_nothing_stays_behind(tmp_path: Path) -> None:
    name = str(tmp_path / "llama")
    tiny.save("llama", tmp_path / "llama")
    backbone = load(name, device="cpu")
    library(tmp_path / "library", backbone, soak.PROMPTS, length=3)
    with served(tmp_path / "library", name, "--client", "1000", "--timeout", "600") as server:

        async def run() -> None:
            ask = soak.Asker(server, backbone, SIZES)
            swapped = await soak.swap(ask)
            assert sum(swapped["answers"].values()) >= 16 and not swapped["broken"]
            gone = await soak.aborts(ask)
            assert sum(gone["statuses"].values()) == 100 and set(gone["statuses"]) <= {"200", str(LEFT)}
            assert not gone["broken"]
            held = await soak.soak(ask)
            assert sum(held["statuses"].values()) == 200
            assert set(held["statuses"]) <= {"200", "400", "404", str(LEFT)}, held["statuses"]
            assert held["tasks"][0] >= held["tasks"][1] and held["descriptors"][0] >= held["descriptors"][1]
            os.kill(server.worker, signal.SIGKILL)
            await server.up()
            assert (await ask.write("p0")()).status == 200
            assert (await server.figures())["incipit:engine_restarts_total"] == 1
            os.kill(server.engine, signal.SIGKILL)  # this one is back without the model being read again
            while (await server.figures())["incipit:engine_restarts_total"] < 2:
                await asyncio.sleep(0.02)
            await server.up()
            assert (await ask.write("p0")()).status == 200
            assert (await server.figures())["incipit:engine_restarts_total"] == 2
            ended = await soak.terminate(ask)
            assert (ended["new"], ended["exit"], ended["finished"]) == (503, 0, 24)
            assert all("ready for" in line for line in ended["broken"]), ended["broken"]

        asyncio.run(run())


def test_a_line_through_points() -> None:
    assert slope([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) == 2 and slope([(1.0, 1.0)]) == 0
    assert [percentile([1.0, 2.0, 3.0, 4.0], p) for p in (50, 75, 99)] == [2, 3, 4]


def test_what_breaks_a_promise_is_told() -> None:
    class Still:
        """A server that leaks a descriptor with every look."""

        fds = 10.0

        async def rest(self) -> dict[str, float]:
            self.fds += 1
            return dict.fromkeys(soak.MEMORY, self.fds * 2**19) | {soak.OPEN: self.fds, soak.TASKS: 3.0}

        async def ask(self, *_: Any, **__: Any) -> soak.Reply:
            return soak.Reply(500)

    class Ids:
        def frequent_ids(self, count: int) -> list[int]:
            return list(range(count))

    found = asyncio.run(soak.soak(soak.Asker(Still(), Ids(), SIZES)))  # type: ignore[arg-type]
    assert found["broken"] == [
        "memory grows by 1000.00 MB per 10,000 requests",  # 1 MiB each 10 requests
        "process_open_fds grew from 11 to 30",
        "statuses {500: 200}",
    ]
