"""An executor in a process of its own: what it answers, what goes over, and what is left when one of them dies."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serve.simulated import Clock, run
from tests.serve.standing import Version, alone, backbone, soft, versions

from incipit.backbones import Backbone, GenerateOptions
from incipit.ensemble import Ensemble
from incipit.errors import EngineDown
from incipit.serve import apart, check, nest
from incipit.serve.asks import Ask, Choose, Sampling
from incipit.serve.core import Core
from incipit.serve.executor import Row
from incipit.serve.panel import Panel
from incipit.serve.scheduler import Limits

PATIENCE = 120
SIZES = {"rows": 4, "room": 64}


@contextmanager
def beside(b: Backbone, **sizes: Any) -> Iterator[apart.Apart]:
    """The two sides, the far one in a thread."""
    near, far = socket.socketpair()
    thread = threading.Thread(target=answered, args=(far, b), kwargs=sizes, daemon=True)
    thread.start()
    try:
        yield apart.Apart(b, apart.Line(near), 0, **sizes)
    finally:
        near.close()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def answered(far: socket.socket, b: Backbone, **sizes: Any) -> None:
    with far:
        apart.answer(apart.Line(far), b, **sizes)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_rows_get_what_they_get_by_themselves(name: str) -> None:
    b = backbone(name)
    ids, known = b.frequent_ids(40), versions(name)
    with beside(b, **SIZES) as far:
        plain = check.room(b, batched=far.mode == "batched", **SIZES)
        assert (far.slots, far.tokens, far.chunks, far.mode) == (4, plain.tokens, plain.chunks, "batched")
        core = Core(far, Clock(), b.decode, b.eos_ids, Limits(chunk=6, spare=1))
        asked = [(tuple(ids[i : i + 3 + i % 5]), known[i % len(known)]) for i in range(14)]
        tickets = [core.submit(Ask(one, v, Sampling(2 + i % 5))) for i, (one, v) in enumerate(asked)]
        for _ in range(3):
            core.turn()
        for ticket in tickets[::5]:
            ticket.cancel()
        run(core)
        for i, (ticket, (one, version)) in enumerate(zip(tickets, asked, strict=True)):
            written = alone(b, one, version, GenerateOptions(2 + i % 5))
            assert list(ticket.tokens) == written[: len(ticket.tokens)]
            assert i % 5 == 0 or len(ticket.tokens) == len(written)
        use = core.state()
        assert use.cache_misses == len(known) - 1 and use.cache_hits and use.cache_prompts == len(known) - 1


def test_draws_and_logprobs_are_those_of_an_executor_here() -> None:
    b = backbone("llama")
    ids, version = tuple(b.frequent_ids(5)), versions("llama")[2]
    asks = [Ask(ids, version, Sampling(5, temperature=1.0, seed=s, logprobs=True)) for s in range(3)]

    def told(executor: Any) -> list[Any]:
        core = Core(executor, Clock(), b.decode)
        tickets = [core.submit(ask) for ask in asks]
        run(core)
        return [list(ticket)[:-1] for ticket in tickets]

    with beside(b, **SIZES) as far:
        assert told(far) == told(check.executor(b, **SIZES)[0])


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_candidates_and_ensembles_are_scored_alike(name: str) -> None:
    b = backbone(name)
    prompts = [soft(b, 3, seed) for seed in (1, 2, 3)]
    members = tuple(Version(f"m{i}", p) for i, p in enumerate(prompts))
    panel = Version("panel", prompts[0])
    panel.panel = Panel(members, Ensemble(tuple(prompts)))  # type: ignore[assignment]
    ids, do = tuple(b.frequent_ids(6)), Choose(((5,), (6, 7)))
    asks = [Ask(ids, v, do) for v in (None, members[1], panel)]
    here = check.executor(b, **SIZES)[0].score(asks)
    with beside(b, **SIZES) as far:
        assert far.score(asks) == here == far.score(asks)


def test_what_was_forgotten_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "KNOWN", 1)
    b, ids = backbone("llama"), tuple(backbone("llama").frequent_ids(4))
    known, sent = versions("llama")[1:4], list[str]()
    plain = apart._loose
    monkeypatch.setattr(apart, "_loose", lambda v, b: sent.append(v.name) or plain(v, b))
    do = Choose(((5,), (6,)))
    with beside(b, **SIZES) as far:
        for _ in range(2):
            for version in known:
                row = Row(Ask(ids, version, Sampling(2)))
                assert far.enter(row) == ""
                (took,) = far.step([(row, len(ids))])
                assert took.token is not None
                far.leave(row)
        assert sent == [v.name for v in known if v is not None] * 2
        asks = [Ask(ids, v, do) for v in known]
        assert [s.error for s in far.score(asks)] == [""] * 3  # more than it remembers, in one call


def test_a_message_holds_a_prompt_and_not_the_model() -> None:
    for name in ("llama", "t5", "bert"):
        b = backbone(name)
        for version in versions(name)[1:]:
            loose = apart._loose(version, b)
            assert len(pickle.dumps(loose)) < 4 * sum(p.numel() for p in loose.made.parameters()) + 20_000


def test_a_prompt_that_cannot_be_computed_ends_its_row_alone() -> None:
    b = backbone("llama")
    astray = soft(b, 3, 1)
    with torch.no_grad():
        next(iter(astray.parameters())).fill_(torch.nan)
    with beside(b, **SIZES) as far:
        core = Core(far, Clock(), b.decode)
        wrong = core.submit(Ask((1, 2), Version("astray", astray), Sampling(2)))
        fine = core.submit(Ask((1, 2), None, Sampling(2)))
        run(core)
        assert wrong.ended is not None and fine.ended is not None
        assert "not finite" in wrong.ended.error and fine.ended.reason in ("stop", "length")


def test_slots_are_given_back_also_when_nobody_comes() -> None:
    b = backbone("llama")
    with beside(b, **SIZES) as far:
        rows = [Row(Ask((1, 2))) for _ in range(4)]
        for _ in range(3):
            for row in rows:
                far.enter(row)
            far.step([(row, 2) for row in rows])
            for row in rows:
                far.leave(row)
        far.rest()
        assert far._left == []
        stranger = Row(Ask((1, 2)))
        far.enter(stranger)
        far.leave(stranger)  # before any step: the far side never hears of it
        far.rest()
        assert far._new == {} == dict.fromkeys(far._left)


def test_a_fault_there_is_told_here(monkeypatch: pytest.MonkeyPatch) -> None:
    b = backbone("llama")
    with beside(b, **SIZES) as far:
        with pytest.raises(EngineDown, match="KeyError in its process"):
            far.step([(Row(Ask((1,)), held=7), 1)])
        with pytest.raises(EngineDown, match="its process has ended"):
            far.score([])

    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(check, "executor", fails)
    with pytest.raises(EngineDown, match="MemoryError in its process"), beside(b):
        pass


def test_a_line_that_breaks_is_no_other_error() -> None:
    near, far = socket.socketpair()
    far.close()
    with near, pytest.raises(EngineDown, match="its process has ended"):
        apart.Apart(backbone("llama"), apart.Line(near), 0)


def test_a_line_carries_objects_of_any_size_in_order() -> None:
    near, far = socket.socketpair()
    with near, far:
        sent = [b"x" * n for n in (0, 1, 70_000, 1_000_000)] + ["end"]
        teller, line = apart.Line(near), apart.Line(far)
        thread = threading.Thread(target=lambda: [teller.send(one) for one in sent], daemon=True)
        thread.start()
        assert [line.receive() for _ in sent] == sent and not line.gone()
        thread.join(PATIENCE)
        near.close()
        assert line.gone()
        with pytest.raises(EOFError):
            line.receive()


# -- real processes --------------------------------------------------------------------------------------------

SERVER = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
from tests.serve.standing import backbone, versions
from incipit.serve import nest
from incipit.serve.asks import Ask, Sampling
from incipit.serve.engine import Engine

b = backbone("llama")
hatchery = nest.Nest(b, 2, rows=4, room=64)
engine = Engine(b, make=hatchery.executor)
engine.start()
ids = tuple(b.frequent_ids(5))
asks = [Ask(ids, v, Sampling(6)) for v in versions("llama")]

def ready():
    while not engine.ready:
        time.sleep(0.01)
    return engine.state().process

def told(**found):
    print(json.dumps(found | {"children": hatchery._pid}), flush=True)

for line in sys.stdin:
    if line.startswith("answer"):
        process = ready()
        tickets = [engine.submit(ask) for ask in asks]
        reasons = [t.wait(120).reason for t in tickets]
        told(process=process, tokens=[t.tokens for t in tickets], reasons=reasons, restarts=engine.state().restarts)
    if line.startswith("idle"):
        process = ready()
        told(process=process)
        while engine.state().restarts == 0:
            time.sleep(0.01)
        told(process=ready())
    if line.startswith("stop"):
        engine.stop()
        hatchery.close()
        told()
"""


class Running:
    """A process with an engine whose executors are forked."""

    def __init__(self) -> None:
        root = Path(__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )  # fmt: skip

    def do(self, what: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def until(true: Callable[[], bool]) -> None:
    """Wait until another process has done something."""
    pause = threading.Event()
    for _ in range(PATIENCE * 50):
        if true():
            return
        pause.wait(0.02)
    raise AssertionError("it has not come about")


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="engines are forked on Linux alone")
def test_an_engine_of_its_own_is_killed_halted_stopped_and_orphaned() -> None:
    b = backbone("llama")
    ids = tuple(b.frequent_ids(5))
    expected = [alone(b, ids, v, GenerateOptions(6)) for v in versions("llama")]
    with Running() as run:
        first = run.do("answer")
        assert first["process"] != run.process.pid and first["restarts"] == 0
        assert first["tokens"] == expected and set(first["reasons"]) <= {"stop", "length"}
        before = first["process"]
        for count, harm in enumerate((signal.SIGKILL, signal.SIGSTOP), 1):
            os.kill(before, harm)
            for _ in range(PATIENCE):  # one that was asked before it was missed says so
                found = run.do("answer")
                if "error" not in found["reasons"]:
                    break
            assert found["tokens"] == expected and found["restarts"] == count
            assert found["process"] != before and gone(before)
            before = found["process"]
        run.process.kill()
        run.process.wait()
        until(lambda: gone(before) and gone(first["children"]))
    with Running() as run:
        first = run.do("idle")
        os.kill(first["process"], signal.SIGKILL)  # nobody asks it for anything
        second = run.read()
        assert second["process"] != first["process"]
        stopped = run.do("stop")
        assert gone(second["process"]) and gone(stopped["children"])
    with Running() as run:  # one that can make no more engines ends, so that who keeps it starts another
        first = run.do("answer")
        os.kill(first["children"], signal.SIGKILL)
        os.kill(first["process"], signal.SIGKILL)
        assert run.process.wait(PATIENCE) == nest.LOST
