"""`incipit serve` as a process of its own over random prompts, and what it says of itself."""

from __future__ import annotations

import asyncio
import math
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.load import Address
from incipit import artifact
from incipit.backbones import Backbone
from incipit.prompts import InputPrompt

PATIENCE = 120.0  # seconds for a server to come up, or to come to rest
START = "import sys; from incipit.cli import main; main(sys.argv[1:])"
TASK = {"kind": "classification", "input": "Review: {text}", "words": ["bad", "good"]}
LINE = re.compile(r"^([a-zA-Z_:]+)(?:\{.*\})? ([0-9.e+-]+|NaN)$", re.MULTILINE)
REST = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "incipit:http_requests_active",
)  # what is 0 at rest


class Watched(Address):
    """A server of which somebody is the owner. key: for its prompts."""

    def __init__(self, url: str, process: subprocess.Popen[str], key: str) -> None:
        super().__init__(url)
        self.process, self.key = process, key

    @property
    def worker(self) -> int:
        """The process that serves; the one that was started keeps it."""
        (found,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(found)

    @property
    def engine(self) -> int:
        """The process that computes: forked by one that the worker has forked."""
        found = self.worker
        for _ in range(2):
            (found,) = map(int, Path(f"/proc/{found}/task/{found}/children").read_text().split())
        return found

    async def figures(self) -> dict[str, float]:
        """What /metrics says, over all labels."""
        found: dict[str, float] = {}
        for name, value in LINE.findall((await self.ask("/metrics")).body.decode()):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    async def ready(self) -> bool:
        """Whether it takes requests."""
        return (await self.ask("/readyz")).status == 200

    async def up(self) -> float:
        """Wait until it takes requests; the seconds that it took."""
        begun = time.perf_counter()
        while not await self.ready():
            if time.perf_counter() - begun > PATIENCE or self.process.poll() is not None:
                raise RuntimeError("the server does not come up")
            await asyncio.sleep(0.02)
        return time.perf_counter() - begun

    async def down(self) -> float:
        """Wait until it takes no requests; the seconds that it took."""
        begun = time.perf_counter()
        while await self.ready():
            if time.perf_counter() - begun > PATIENCE:
                raise RuntimeError("the server stays ready")
            await asyncio.sleep(0.005)
        return time.perf_counter() - begun

    async def runs(self, rows: int) -> None:
        """Wait until so many rows are in the batch."""
        begun = time.perf_counter()
        while (await self.figures())["vllm:num_requests_running"] < rows:
            if time.perf_counter() - begun > PATIENCE:
                raise RuntimeError(f"there are never {rows} rows in the batch")
            await asyncio.sleep(0.005)

    async def rest(self) -> dict[str, float]:
        """Its figures when nothing is under way any more."""
        begun = time.perf_counter()
        while True:
            found = await self.figures()
            if not any(found[name] for name in REST):
                return found
            if time.perf_counter() - begun > PATIENCE:
                raise RuntimeError(f"the server does not come to rest: { {n: found[n] for n in REST} }")
            await asyncio.sleep(0.02)


def library(folder: Path, backbone: Backbone, count: int, length: int = 20) -> None:
    """Prompts p0, p1, ... of random rows as large as the embeddings; each also chooses between two words."""
    source = torch.Generator().manual_seed(0)
    for k in range(count):
        rows = (
            torch.randn(length, backbone.geometry.hidden, generator=source) * backbone.geometry.embedding_rms
        )
        prompt = InputPrompt(backbone.geometry, length, rows=rows)
        artifact.save(folder / f"p{k}", prompt=prompt, backbone=backbone, name=f"p{k}", task=TASK)


@contextmanager
def served(place: Path, name: str, *more: str) -> Iterator[Watched]:
    """A server of the library at `place` over a backbone, on a free port."""
    key = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "admin").write_text(key)
        command = [
            sys.executable,
            "-c",
            START,
            "serve",
            str(place),
            "--backbone",
            name,
            "--port",
            "0",
            "--quiet",
        ]
        command += ["--admin-keys", f"{folder}/admin", "--device", "cpu", *more]
        ours = os.pathsep.join([str(Path(artifact.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": ours}
        )
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if "prompts over" not in said:
                raise RuntimeError(f"the server does not start: {said}")
            found = Watched(said.rsplit(" ", 1)[1].strip(), process, key)
            asyncio.run(found.up())
            yield found
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            process.stdout.close()  # type: ignore[union-attr]


def percentile(values: list[float], p: float) -> float:
    """The nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * p / 100) - 1)] if ordered else 0.0


def slope(points: list[tuple[float, float]]) -> float:
    """Of the straight line of least squares through (x, y)."""
    x0, y0 = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    below = sum((x - x0) ** 2 for x, _ in points)
    return sum((x - x0) * (y - y0) for x, y in points) / below if below else 0.0


def counted(values: list[Any]) -> dict[str, int]:
    """How often each value occurs."""
    return {str(v): values.count(v) for v in sorted(set(values))}
