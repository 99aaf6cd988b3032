"""What the soak asks: requests of every kind, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.load import Reply
from benchmarks.soak_server import Watched
from incipit.backbones import Backbone

PROMPTS = 16
Job = Callable[[], Awaitable[Reply]]


@dataclass
class Sizes:
    """How much is asked. requests: of the soak. aborts. seconds: of overload, and of each half of fairness."""

    requests: int = 100_000
    aborts: int = 10_000
    seconds: float = 60.0
    swaps: int = 100
    turns: int = 10
    new: int = 16


class Asker:
    """Makes requests: texts of frequent words, drawn from a seed."""

    def __init__(self, server: Watched, backbone: Backbone, sizes: Sizes) -> None:
        self.server, self.sizes = server, sizes
        self.source, self.ids = random.Random(0), backbone.frequent_ids(2000)

    def write(self, prompt: str, *, leave: float = 120.0, **more: Any) -> Job:
        """A completion of 8 to 23 tokens read and `new` written."""
        ids = self.source.choices(self.ids, k=self.source.randrange(8, 24))
        body = {"model": prompt, "prompt": ids, "max_tokens": self.sizes.new, "ignore_eos": True} | more
        return lambda: self.server.ask("/v1/completions", body, leave=leave)

    def any(self, i: int) -> Job:
        """One of all kinds: written, streamed, chosen, refused, given up."""
        prompt, kind = f"p{i % PROMPTS}", self.source.random()
        if kind < 0.5:
            return self.write(prompt)
        if kind < 0.7:
            return self.write(prompt, stream=True, temperature=1.0)
        if kind < 0.8:
            body = {"model": prompt, "input": ["a fine film", "it broke"]}
            return lambda: self.server.ask("/v1/classify", body)
        if kind < 0.9:
            return self.write(prompt if kind < 0.85 else "nobody", max_tokens=4 if kind < 0.85 else 10**6)
        return self.write(prompt, stream=kind < 0.95, leave=self.source.random() / 2)
