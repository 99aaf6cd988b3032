"""What runs rows: the seam between the scheduler, which knows no tensors, and the model.

An executor holds the memory of the rows that are open. One `step` reads some positions of some rows and writes the next
token of those that have been read to their end; the scheduler never asks for more than `fits` and `slots` allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from incipit.errors import EngineDown
from incipit.serve.asks import Ask


@dataclass(eq=False)
class Row:
    """A request that is being written. read: how many of its input positions the model has read; new: its tokens so
    far; seed: of its draws; held: what the executor keeps for it."""

    ask: Ask
    seed: int = 0
    read: int = 0
    new: list[int] = field(default_factory=list)
    held: Any = None


@dataclass(frozen=True)
class Took:
    """What a step did for a row: a token (None: its input is not read to the end yet), or why it cannot go on."""

    token: int | None = None
    logprob: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Scored:
    """log p of each candidate, or why there is none. choice: the candidate that is taken, where it is not the likeliest
    by these (an ensemble's vote ends ties by more than shares)."""

    logs: tuple[float, ...] = ()
    error: str = ""
    choice: int | None = None


@dataclass(frozen=True)
class CacheUse:
    """Prompts as the model reads them: how many were there, had to be computed, are kept."""

    hits: int = 0
    misses: int = 0
    prompts: int = 0
    bytes: int = 0
    max_bytes: int = 0


class Room(Protocol):
    """slots: rows that may be open at once. tokens: positions that these hold together. chunks: whether an input may be
    read in parts. shares: whether a prompt is read once, before the first of its rows, and not with each of them. mode:
    "batched" or "rows". process: id of the process that computes; 0: this one."""

    slots: int
    tokens: int
    chunks: bool
    shares: bool
    mode: str
    process: int

    def fits(self, ask: Ask) -> str:
        """Why a request can never be served here; "" when it can."""

    def cost(self, ask: Ask) -> int:
        """Positions that a request may take at most, which is what admission reserves."""


class Executor(Room, Protocol):
    """A Room with the model in it."""

    def enter(self, row: Row) -> str:
        """Take a slot and the prompt; returns why that is impossible, with nothing taken; ""."""

    def step(self, work: Sequence[tuple[Row, int]]) -> list[Took]:
        """Read the next n input positions of each row (n = 0: the token that it wrote last)."""

    def score(self, asks: Sequence[Ask]) -> list[Scored]:
        """Score the candidates of requests that choose, in one pass."""

    def leave(self, row: Row) -> None:
        """Give the slot and the prompt back."""

    def rest(self) -> None:
        """There is nothing to do just now. Raises where there could be nothing done."""

    def cache(self) -> CacheUse:
        """The prompt cache, since the executor was made."""


class Nobody:
    """In the place of an executor that is not there yet, or was given up."""

    slots, tokens, chunks, shares, mode, process = 0, 0, True, False, "", 0

    def fits(self, ask: Ask) -> str:
        raise EngineDown("the engine failed and is coming back; try again", 1.0)

    def cost(self, ask: Ask) -> int:
        raise AssertionError("nothing is admitted here")

    def enter(self, row: Row) -> str:
        raise AssertionError("nothing is opened here")

    def step(self, work: Sequence[tuple[Row, int]]) -> list[Took]:
        raise AssertionError("nothing runs here")

    def score(self, asks: Sequence[Ask]) -> list[Scored]:
        raise AssertionError("nothing runs here")

    def leave(self, row: Row) -> None:
        """Its memory went with it."""

    def rest(self) -> None:
        """Always."""

    def cache(self) -> CacheUse:
        return CacheUse()
