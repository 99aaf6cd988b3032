"""The engine in its threads: it starts, fails, comes back, drains and stops; and nobody waits for ever."""

import asyncio
import threading
from collections.abc import Callable

import pytest
from tests.serve.simulated import Clock, Simulated
from tests.serve.standing import Version, alone, backbone, versions

from incipit.backbones import GenerateOptions
from incipit.errors import Draining, EngineDown
from incipit.serve.asks import AnyEngine, Ask, Choose, Delta, End, Sampling
from incipit.serve.engine import Engine

LONG = 100.0  # seconds after which a test has failed; nothing here waits for a time to pass


def until(true: Callable[[], bool]) -> None:
    """Wait until something that other threads bring about is so."""
    gone = threading.Event()
    for _ in range(int(LONG / 0.01)):
        if true():
            return
        gone.wait(0.01)
    raise AssertionError("it has not come about")


class Running:
    """An engine over simulated executors, all of which are kept in `made`."""

    def __init__(self, stuck_after: float = LONG) -> None:
        self.made: list[Simulated] = []
        self.broken = 0  # how many executors shall fail to come up
        self.engine = Engine(backbone("llama"), make=self._make, stuck_after=stuck_after)

    def _make(self) -> Simulated:
        if self.broken:
            self.broken -= 1
            raise RuntimeError("no memory")
        self.made.append(Simulated(Clock()))
        return self.made[-1]

    def __enter__(self) -> "Running":
        self.engine.start()
        until(lambda: self.engine.ready)
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.stop()


def test_it_promises_what_http_needs() -> None:
    engine: AnyEngine = Engine(backbone("llama"))
    assert not engine.ready and engine.why == "not started"
    with pytest.raises(EngineDown, match="not started"):
        engine.submit(Ask((1,)))
    assert engine.state().refused == {"EngineDown": 1}
    engine.stop()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_real_model_answers_threads_and_loops(name: str) -> None:
    b, known = backbone(name), versions(name)
    engine = Engine(b, rows=4, room=64)
    engine.start()
    try:
        _answers(engine, known)
    finally:
        engine.stop()
    assert [t.name for t in threading.enumerate() if t.name.startswith("incipit-engine")] == []


def _answers(engine: Engine, known: list[Version | None]) -> None:
    b = engine.backbone
    until(lambda: engine.ready)
    ids = tuple(b.frequent_ids(5))
    tickets = [engine.submit(Ask(ids, v, Sampling(6), task=str(i))) for i, v in enumerate(known)]

    async def read() -> list[object]:
        return [event async for event in tickets[1]]

    events = asyncio.run(read())
    assert isinstance(events[-1], End) and events == list(tickets[1])
    for ticket, version in zip(tickets, known, strict=True):
        assert ticket.wait(LONG).reason in ("stop", "length")
        assert list(ticket.tokens) == alone(b, ids, version, GenerateOptions(6))
        assert ticket.text.strip() == b.decode(ticket.tokens)
    assert engine.submit(Ask(ids, None, Choose(((5,), (6,))))).wait(LONG).reason == "stop"
    state = engine.state()
    assert state.ready and state.mode == "batched" and state.finished.get("error") is None


def test_an_engine_that_dies_tells_everybody_and_comes_back() -> None:
    with Running() as run:
        gate = threading.Event()
        plain = run.made[0].step

        def dies(work: object) -> object:
            gate.wait(LONG)
            raise MemoryError

        run.made[0].step = dies  # type: ignore[method-assign,assignment]
        tickets = [run.engine.submit(Ask((1,))) for _ in range(9)]
        run.broken = 2
        gate.set()
        for ticket in tickets:
            end = ticket.wait(LONG)
            assert end.reason == "error" and "the engine failed (MemoryError)" in end.error
        until(lambda: run.engine.ready)
        assert len(run.made) == 2 and run.broken == 0 and plain is not None
        assert run.engine.submit(Ask((1,), None, Sampling(2))).wait(LONG).reason == "length"
        assert run.engine.state().restarts == 1


def test_an_engine_whose_making_panics_tries_again() -> None:
    class Panic(BaseException):
        """What a library in Rust raises."""

    made: list[int] = []

    def make() -> Simulated:
        made.append(1)
        if len(made) == 1:
            raise Panic
        return Simulated(Clock())

    engine = Engine(backbone("llama"), make=make, stuck_after=LONG)
    engine.start()
    try:
        until(lambda: engine.ready)
        assert len(made) == 2 and engine.submit(Ask((1,), None, Sampling(2))).wait(LONG).reason == "length"
    finally:
        engine.stop()


def test_a_step_that_hangs_is_given_up() -> None:
    with Running(stuck_after=1.0) as run:
        gate, hangs = threading.Event(), threading.Event()
        stuck, plain = run.made[0], run.made[0].step

        def hang(work: object) -> object:
            hangs.set()
            gate.wait(LONG)
            return plain(work)  # type: ignore[arg-type]

        stuck.step = hang  # type: ignore[method-assign,assignment]
        ticket = run.engine.submit(Ask((1,), None, Sampling(3)))
        hangs.wait(LONG)
        end = ticket.wait(LONG)
        assert end.reason == "error" and "a step has taken more than 1.0 s" in end.error
        run.engine.stuck_after = LONG
        until(lambda: run.engine.ready)
        assert len(run.made) == 2
        second = run.engine.submit(Ask((1,), None, Sampling(3)))
        assert second.wait(LONG).reason == "length"
        gate.set()  # the old thread goes on, and finds that nobody wants what it has
        until(lambda: sum(t.name == "incipit-engine" for t in threading.enumerate()) == 1)
        assert len(list(ticket)) == 1 and run.engine.ready


def test_draining_finishes_what_was_taken_and_takes_no_more() -> None:
    with Running() as run:
        gate, plain = threading.Event(), run.made[0].step

        def waits(work: object) -> object:
            gate.wait(LONG)
            return plain(work)  # type: ignore[arg-type]

        run.made[0].step = waits  # type: ignore[method-assign,assignment]
        tickets = [run.engine.submit(Ask((1,), None, Sampling(2))) for _ in range(6)]
        run.engine.drain()
        assert not run.engine.ready and run.engine.why == "the server is shutting down"
        with pytest.raises(Draining):
            run.engine.submit(Ask((1,)))
        assert not run.engine.drained(timeout=0.0)
        gate.set()
        assert run.engine.drained(timeout=LONG)
        assert all(t.wait(LONG).reason == "length" for t in tickets)


def test_stopping_ends_what_runs() -> None:
    with Running() as run:
        gate, plain = threading.Event(), run.made[0].step

        def waits(work: object) -> object:
            gate.wait(LONG)
            return plain(work)  # type: ignore[arg-type]

        run.made[0].step = waits  # type: ignore[method-assign,assignment]
        tickets = [run.engine.submit(Ask((1,))) for _ in range(6)]
        threading.Timer(0.05, gate.set).start()
        run.engine.stop()
        assert {t.wait(LONG).reason for t in tickets} == {"cancelled"}
        run.engine.stop()
        run.engine.start()
        assert run.engine.why == "stopped"


def test_a_reader_of_a_closed_loop_harms_nobody() -> None:
    with Running() as run:
        gate, plain = threading.Event(), run.made[0].step

        def waits(work: object) -> object:
            gate.wait(LONG)
            return plain(work)  # type: ignore[arg-type]

        run.made[0].step = waits  # type: ignore[method-assign,assignment]
        ticket, other = (run.engine.submit(Ask((1,), None, Sampling(3))) for _ in range(2))

        async def leaves() -> None:
            reader = asyncio.ensure_future(anext(ticket.__aiter__()))
            await asyncio.sleep(0)
            reader.cancel()

        asyncio.run(leaves())
        ticket.listen(lambda event: 1 / 0)  # type: ignore[arg-type,return-value]
        gate.set()
        assert [type(e) for e in ticket] == [Delta] * 3 + [End] == [type(e) for e in other]
