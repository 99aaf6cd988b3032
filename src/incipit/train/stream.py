"""Streams: where a trainee's rows come from, one after another, without end, from a seed and a position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from incipit.batch import Encoded
from incipit.errors import DataError

Record = TypeVar("Record")


class Stream(Protocol):
    """Rows for training. Two streams of one seed give the same rows; `restore(state())` changes nothing."""

    def next(self, count: int) -> list[Encoded]:
        """The next `count` rows."""

    def state(self) -> dict[str, Any]:
        """JSON-able position."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position."""


class ExampleStream(Generic[Record]):
    """Examples in a new random order every pass: row i is examples[permutation(seed, i // n)[i % n]].

    `encode` makes token ids of an example when its turn comes; the result is kept, for epochs read it again.
    """

    def __init__(
        self, examples: Sequence[Record], encode: Callable[[Record], Encoded], seed: int = 0
    ) -> None:
        if not len(examples):
            raise DataError("the training split is empty: check the task's files and its filter")
        self.examples, self.encode, self.seed = examples, encode, seed
        self.position = 0
        self._order: tuple[int, list[int]] = (-1, [])
        self._encoded: dict[int, Encoded] = {}

    def next(self, count: int) -> list[Encoded]:
        """The next `count` rows."""
        return [self._row() for _ in range(count)]

    def _row(self) -> Encoded:
        turn, place = divmod(self.position, len(self.examples))
        if self._order[0] != turn:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + turn) % 2**63)
            self._order = (turn, torch.randperm(len(self.examples), generator=generator).tolist())
        index = self._order[1][place]
        if index not in self._encoded:
            self._encoded[index] = self.encode(self.examples[index])
        self.position += 1
        return self._encoded[index]

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        return {"position": self.position, "examples": len(self.examples)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; refuses a split that has changed its size."""
        if int(state["examples"]) != len(self.examples):
            raise DataError(
                f"the run was saved with {state['examples']} training examples, now there are "
                f"{len(self.examples)}: restore the data, or start a new run"
            )
        self.position = int(state["position"])


class PassStream(Generic[Record]):
    """Examples of data that is never held whole: pass after pass of `read(pass number)`, which fixes the order.

    Restoring reads the present pass again up to the saved position.
    """

    def __init__(self, read: Callable[[int], Iterator[Record]], encode: Callable[[Record], Encoded]) -> None:
        self.read, self.encode = read, encode
        self.turn, self.position = 0, 0
        self._open: Iterator[Record] | None = None

    def next(self, count: int) -> list[Encoded]:
        """The next `count` rows."""
        return [self.encode(self._record()) for _ in range(count)]

    def _record(self) -> Record:
        for _ in range(2):  # the end of one pass, then the first record of the next
            if self._open is None:
                self._open, self.position = self.read(self.turn), 0
            for record in self._open:
                self.position += 1
                return record
            self._open, self.turn = None, self.turn + 1
        raise DataError("the training stream holds no examples: check the task's source and its filter")

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        return {"turn": self.turn, "position": self.position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.turn, self._open = int(state["turn"]), self.read(int(state["turn"]))
        self.position = 0
        for _ in range(int(state["position"])):
            next(self._open)
            self.position += 1
