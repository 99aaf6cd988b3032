"""The engine in process, without HTTP: requests per second over clients and tasks, and what batching and mixing cost.

python -m benchmarks.serve_engine [--backbone builtin:lm] [--requests 128] [--new 16] [--length 20] [--rounds 5]

Closed loop: each client asks again as soon as it is answered. Seconds are those of this process, on one thread, so that
neighbours on the machine count little; each figure is the best of `rounds`, the variants taking turns.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from incipit.backbones import Backbone, load
from incipit.prompts import InputPrompt, Prompt
from incipit.serve import check
from incipit.serve.asks import Ask, Sampling, Ticket
from incipit.serve.core import Core
from incipit.serve.scheduler import Limits


@dataclass
class Version:
    """A random prompt that is on no disk."""

    name: str
    made: Prompt
    card: Mapping[str, Any] = field(default_factory=dict)
    panel: None = None

    @property
    def id(self) -> str:
        return self.name

    @property
    def length(self) -> int:
        return self.made.length

    def prompt(self, backbone: Backbone) -> Prompt:
        return self.made

    def again(self) -> Version:
        return self

    @property
    def form(self) -> Mapping[str, Any]:
        return self.card

    def __enter__(self) -> Version:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Nothing is held."""


def versions(backbone: Backbone, count: int, length: int) -> list[Version]:
    """Prompts of random rows, as large as the embeddings."""
    source = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        prompt = InputPrompt(backbone.geometry, length)
        rows = torch.randn(length, backbone.geometry.hidden, generator=source)
        prompt.set_rows(rows * backbone.geometry.embedding_rms)
        found.append(Version(f"task {i}", prompt.to(backbone.device)))
    return found


def rate(core: Core, asks: list[Ask], clients: int) -> float:
    """Requests per second of this process, with so many clients."""
    todo, live, begun = list(asks), list[Ticket](), time.process_time()
    while todo or live:
        live = [ticket for ticket in live if ticket.ended is None]
        while todo and len(live) < clients:
            live.append(core.submit(todo.pop()))
        core.turn()
    return len(asks) / (time.process_time() - begun)


def main() -> None:
    """Print a table of requests per second, and the two ratios that are promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="builtin:lm")
    for name, value in (("requests", 128), ("new", 16), ("length", 20), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.set_num_threads(1)
    backbone = load(given.backbone)
    executor, why = check.executor(backbone, rows=66)
    print(f"{backbone.name}: {executor.mode} {why}")
    core = Core(executor, time.monotonic, backbone.decode, (), Limits(waiting=10**6, client=10**6))
    tasks, ids = versions(backbone, 64, given.length), backbone.frequent_ids(2000)

    def asks(count: int, distinct: int) -> list[Ask]:
        source = random.Random(0)
        do = Sampling(given.new, ignore_end=True)
        texts = [tuple(source.choices(ids, k=source.randrange(8, 24))) for _ in range(count)]
        return [Ask(t, tasks[i % distinct], do, f"{i % distinct}") for i, t in enumerate(texts)]

    wanted = [(1, 1), (4, 4), (16, 1), (16, 16), (32, 32), (64, 64)]  # clients, tasks
    best: dict[tuple[int, int], float] = dict.fromkeys(wanted, 0.0)
    for _ in range(given.rounds):
        for clients, distinct in wanted:
            count = given.requests if clients > 1 else given.requests // 4
            best[clients, distinct] = max(best[clients, distinct], rate(core, asks(count, distinct), clients))
    print(f"{'clients':>8} {'tasks':>6} {'requests/s':>11}")
    for (clients, distinct), found in best.items():
        print(f"{clients:>8} {distinct:>6} {found:>11.1f}")
    print(f"16 clients over 1: {best[16, 16] / best[1, 1]:.2f} times (promised: 4)")
    print(f"16 tasks over 1, at 16 clients: {best[16, 16] / best[16, 1]:.3f} (promised: 0.95)")


if __name__ == "__main__":
    main()
