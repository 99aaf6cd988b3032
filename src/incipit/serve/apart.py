"""An executor in a process of its own: what the model computes and what HTTP does share no interpreter then.

The messages are pickles between a process and one that it has forked, over a pair of sockets that nobody else holds. A
step is one message there and one back: each time that a thread waits, others of its process may keep it waiting longer.
A version goes over once, and again where it has been forgotten there.
"""

from __future__ import annotations

import logging
import pickle
import socket
import struct
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from typing import Any

from incipit.backbones import Backbone
from incipit.errors import EngineDown
from incipit.serve import check
from incipit.serve.asks import Ask
from incipit.serve.executor import CacheUse, Executor, Row, Scored, Took
from incipit.serve.panel import Panel
from incipit.serve.versions import Loose

KNOWN = 2**26  # bytes of versions that the other side remembers, besides those of the call at hand
_SIZE = struct.Struct("!Q")


class Line:
    """One end of a pair of sockets, for pickles. Both raise EOFError where the other end is gone."""

    def __init__(self, end: socket.socket) -> None:
        self._end, self._rest = end, b""

    def __del__(self) -> None:
        self._end.close()  # not before: a thread that still reads it must not read what another opens in its place

    def send(self, said: Any) -> None:
        """Send one object."""
        data = pickle.dumps(said)
        try:
            self._end.sendall(_SIZE.pack(len(data)) + data)
        except OSError as error:
            raise EOFError from error

    def receive(self) -> Any:
        """Wait for one object."""
        size = _SIZE.unpack(self._take(_SIZE.size))[0]
        return pickle.loads(self._take(size))

    def gone(self) -> bool:
        """Whether the other end is closed, where it has nothing to say."""
        try:
            return not self._end.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _take(self, size: int) -> bytes:
        parts = [self._rest]
        left = size - len(self._rest)
        while left > 0:
            try:
                part = self._end.recv(max(left, 2**16))
            except OSError as error:
                raise EOFError from error
            if not part:
                raise EOFError
            parts.append(part)
            left -= len(part)
        data = b"".join(parts)
        self._rest = data[size:]
        return data[:size]


class Apart:
    """The near side: an Executor that asks the far one.

    process: where that is. sizes: what fits there. One thread uses it; EngineDown where the far side failed or is gone.
    """

    def __init__(self, backbone: Backbone, line: Line, process: int, **sizes: Any) -> None:
        self.backbone, self.process, self._line = backbone, process, line
        room = check.room(backbone, batched=self._call("hello"), **sizes)
        self.slots, self.tokens, self.mode = room.slots, room.tokens, room.mode
        self.chunks, self.shares = room.chunks, room.shares
        self.fits, self.cost = room.fits, room.cost
        self._numbers = count()
        self._new: dict[int, Row] = {}  # rows that the far side has not heard of
        self._left: list[int] = []  # rows of which it has not heard that they are gone
        self._use = CacheUse()

    def enter(self, row: Row) -> str:
        """The far side takes it with the next step; what is wrong with its prompt is told then."""
        row.held = next(self._numbers)
        self._new[row.held] = row
        return ""

    def step(self, work: Sequence[tuple[Row, int]]) -> list[Took]:
        new = [(n, _plain(row.ask), row.seed) for n, row in self._new.items()]
        stands = [(row.held, n, row.read, len(row.new), row.new[-1:]) for row, n in work]
        found = self._with([row.ask.version for row in self._new.values()], "step", self._left, new, stands)
        self._new, self._left = {}, []
        return [Took(*one) for one in found]

    def score(self, asks: Sequence[Ask]) -> list[Scored]:
        found = self._with([a.version for a in asks], "score", [_plain(a) for a in asks])
        return [Scored(*one) for one in found]

    def leave(self, row: Row) -> None:
        if self._new.pop(row.held, None) is None:
            self._left.append(row.held)
        row.held = None

    def rest(self) -> None:
        if self._line.gone():
            raise EngineDown("its process has ended")
        if self._left:
            self.step(())  # slots and prompts are given back also where nobody comes any more

    def cache(self) -> CacheUse:
        return self._use

    def _with(self, versions: Sequence[Any], what: str, *given: Any) -> Any:
        """The answer to a call that needs versions, which are sent where they are not known."""
        unknown, found, use = self._call(what, {}, *given)
        if unknown:
            there = {v.id: v for v in versions if v is not None and v.id in unknown}
            sent = {name: pickle.dumps(_loose(v, self.backbone)) for name, v in there.items()}
            _, found, use = self._call(what, sent, *given)
        self._use = CacheUse(*use)
        return found

    def _call(self, *said: Any) -> Any:
        try:
            self._line.send(said)
            fault, found = self._line.receive()
        except EOFError as error:
            raise EngineDown("its process has ended") from error
        if fault:
            raise EngineDown(fault)
        return found


def _plain(ask: Ask) -> tuple[Any, ...]:
    """What the far side needs of a request: ids, what to do, the id of its version."""
    return ask.ids, ask.do, ask.version.id if ask.version is not None else None


def _loose(version: Any, backbone: Backbone) -> Loose:
    """A version as it can be sent: without what counts who holds it."""
    if version.panel is None:
        return Loose(version.name, version.id, version.prompt(backbone))
    members = tuple(_loose(member, backbone) for member in version.panel.members)
    return Loose(version.name, version.id, panel=Panel(members, version.panel.rule))


# -- the far side ----------------------------------------------------------------------------------------------


def answer(line: Line, backbone: Backbone, **sizes: Any) -> None:
    """Make the executor and do what is asked, until the near side is gone or something fails."""
    far: _Far | None = None
    try:
        while True:
            what, *given = line.receive()
            try:
                if far is None:  # "hello" comes first
                    far = _Far(check.executor(backbone, **sizes)[0])
                found = getattr(far, what)(*given)
            except BaseException as error:  # whatever it is, the near side must hear of it
                logging.getLogger("incipit.serve").error("step failed", exc_info=error)
                line.send((f"{type(error).__name__} in its process", None))
                return
            line.send(("", found))
    except EOFError:
        return


class _Far:
    """Rows by their numbers, and versions by their ids. What needs versions returns (unknown ones, found, cache)."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.rows: dict[int, Row] = {}
        self.known: OrderedDict[str, tuple[Loose, int]] = OrderedDict()
        self.bytes = 0

    def hello(self) -> bool:
        return self.executor.mode == "batched"

    def step(
        self,
        sent: dict[str, bytes],
        left: list[int],
        new: list[tuple[int, tuple[Any, ...], int]],
        work: list[tuple[int, int, int, int, list[int]]],
    ) -> tuple[Any, ...]:
        asks, unknown = self._asks(sent, [plain for _, plain, _ in new])
        if unknown:
            return unknown, (), ()
        for number in left:
            if number in self.rows:  # not one that could not enter
                self.executor.leave(self.rows.pop(number))
        faults: dict[int, str] = {}
        for (number, _, seed), ask in zip(new, asks, strict=True):
            self.rows[number] = row = Row(ask, seed)
            if why := self.executor.enter(row):
                faults[number] = why
                del self.rows[number]
        found: dict[int, Any] = {n: (None, 0.0, why) for n, why in faults.items()}
        fine = [(self._row(n, *at), count) for n, count, *at in work if n not in faults]  # type: ignore[arg-type]
        took = iter(self.executor.step(fine) if fine else ())
        for number, *_ in work:
            if number not in faults:
                one = next(took)
                found[number] = (one.token, one.logprob, one.error)
        return [], [found[number] for number, *_ in work], self._use()

    def score(self, sent: dict[str, bytes], plain: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        asks, unknown = self._asks(sent, plain)
        found = [(s.logs, s.error, s.choice) for s in self.executor.score(asks)] if not unknown else ()
        return unknown, found, self._use()

    def _row(self, number: int, read: int, written: int, last: list[int]) -> Row:
        """A row as it stands on the near side: a step gives it one token at most."""
        row = self.rows[number]
        row.read = read
        if written > len(row.new):
            row.new += last
        return row

    def _use(self) -> tuple[int, ...]:
        use = self.executor.cache()
        return use.hits, use.misses, use.prompts, use.bytes, use.max_bytes

    def _asks(self, sent: dict[str, bytes], plain: Sequence[tuple[Any, ...]]) -> tuple[list[Ask], list[str]]:
        """(requests with their versions, which of these are not known). Beyond KNOWN the oldest are forgotten."""
        for name, data in sent.items():
            self.known[name] = pickle.loads(data), len(data)
            self.bytes += len(data)
        names = [name for name in dict.fromkeys(name for *_, name in plain) if name is not None]
        unknown = [name for name in names if name not in self.known]
        if unknown:
            return [], unknown
        for name in names:
            self.known.move_to_end(name)
        asks = [Ask(ids, self.known[name][0] if name is not None else None, do) for ids, do, name in plain]
        while self.bytes > KNOWN and self.known:
            self.bytes -= self.known.popitem(last=False)[1][1]
        return asks, []
