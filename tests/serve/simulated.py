"""An executor that runs no model: it keeps accounts, and its steps take virtual time."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from incipit.serve.asks import Ask, Choose, Sampling
from incipit.serve.core import Core
from incipit.serve.executor import CacheUse, Row, Scored, Took
from incipit.serve.scheduler import Limits


@dataclass
class Clock:
    """Seconds that pass when somebody says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Version:
    """A pinned version without a prompt; pins counts who holds it."""

    name: str
    length: int = 4
    pins: int = 0
    released: int = 0
    panel: None = None

    @property
    def id(self) -> str:
        return self.name

    def again(self) -> "Version":
        self.pins += 1
        return self

    def release(self) -> None:
        self.pins -= 1


@dataclass
class Simulated:
    """A step takes `base` seconds and `each` for every row and position that is read. Token k of a row is 100 + k.

    keeps: prompts that are ready at a time, the last used; each other one is read when a row enters. 0: with the rows.
    """

    clock: Clock
    slots: int = 4
    tokens: int = 400
    chunks: bool = True
    base: float = 0.01
    each: float = 0.001
    mode: str = "batched"
    process: int = 0
    room: int = 100
    open_rows: set[Row] = field(default_factory=set)
    keeps: int = 0
    kept: OrderedDict[str, None] = field(default_factory=OrderedDict)
    reading: int = 0  # positions of prompts that are read before the next step
    longest: int = 0  # most positions that a step has read
    fault: Exception | None = None

    @property
    def shares(self) -> bool:
        return self.keeps > 0

    def fits(self, ask: Ask) -> str:
        return "" if self.cost(ask) <= self.room else "too long for a slot"

    def cost(self, ask: Ask) -> int:
        return len(ask.ids) + (ask.do.max_new_tokens if isinstance(ask.do, Sampling) else 0)

    def enter(self, row: Row) -> str:
        if row.ask.task == "broken":
            return "its prompt is broken"
        assert row not in self.open_rows and len(self.open_rows) < self.slots
        assert sum(self.cost(r.ask) for r in self.open_rows) + self.cost(row.ask) <= self.tokens
        self.open_rows.add(row)
        row.held = "slot"
        if self.shares and row.ask.version is not None:
            if row.ask.version.id not in self.kept:
                self.reading += row.ask.version.length
            self.kept[row.ask.version.id] = None
            self.kept.move_to_end(row.ask.version.id)
            while len(self.kept) > self.keeps:
                self.kept.popitem(last=False)
        return ""

    def step(self, work: Sequence[tuple[Row, int]]) -> list[Took]:
        if self.fault is not None:
            raise self.fault
        assert len({id(row) for row, _ in work}) == len(work)
        read, self.reading = sum(n for _, n in work) + self.reading, 0
        self.longest = max(self.longest, read)
        self.clock.now += self.base + self.each * (len(work) + read)
        took = []
        for row, count in work:
            assert row in self.open_rows
            assert (count == 0) == (row.read >= len(row.ask.ids)), "it reads before it writes"
            if row.ask.task == "nan" and len(row.new) == 2:
                took.append(Took(error="not finite"))
            elif row.read + count < len(row.ask.ids):
                took.append(Took())
            else:
                took.append(Took(100 + len(row.new)))
        return took

    def score(self, asks: Sequence[Ask]) -> list[Scored]:
        if self.fault is not None:
            raise self.fault
        self.clock.now += self.base + self.each * sum(len(a.ids) for a in asks)
        return [
            Scored(tuple(-float(i) for i in range(len(a.do.ends)))) for a in asks if isinstance(a.do, Choose)
        ]

    def leave(self, row: Row) -> None:
        self.open_rows.remove(row)
        row.held = None

    def rest(self) -> None:
        pass

    def cache(self) -> CacheUse:
        return CacheUse(hits=1, prompts=len(self.kept))


def core(limits: Limits | None = None, **settings: object) -> tuple[Core, Simulated, Clock]:
    """A core over a simulated executor. Text of token k is "<k>"."""
    clock = Clock()
    executor = Simulated(clock, **settings)  # type: ignore[arg-type]
    made = Core(executor, clock, lambda ids: "".join(f"<{i}>" for i in ids), ends=(1,), limits=limits)
    return made, executor, clock


def run(made: Core, most: int = 100_000) -> None:
    """Turn until nothing is left."""
    for _ in range(most):
        if not made.turn() and not made.jobs:
            return
    raise AssertionError("it does not end")
