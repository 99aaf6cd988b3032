"""A scripted engine and store behind the real HTTP side: what each ticket gets is decided by the test."""

import asyncio
import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from incipit.backbones import Backbone, tiny, wrap
from incipit.errors import ArtifactError, AskError, UnknownPrompt, nearest
from incipit.serve.asks import Ask, Choose, Delta, End, Listed, State, Ticket
from incipit.serve.http.app import Options, make_app
from incipit.serve.http.gate import Gate
from incipit.serve.http.server import Server, listening

PATIENCE = 60  # seconds; a bound for a machine that is frozen, never what a test waits for


class FakeEngine:
    """`by_hand`: tickets are left to the test. refuse: what submit raises. Otherwise writes "w0 w1 ..." at once."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.ready, self.why = True, ""
        self.by_hand = False
        self.refuse: list[Exception | None] = []
        self.tickets: list[Ticket] = []
        self.cancelled: list[Ticket] = []
        self.now = State(ready=True, mode="batched")
        self.started = self.stopped = False
        self.came = threading.Condition()

    def start(self) -> None:
        self.started = True

    def stop(self) -> None:
        self.stopped = True
        for ticket in self.tickets:
            ticket.put(End("cancelled"))

    def state(self) -> State:
        return self.now

    def drain(self) -> None: ...

    def drained(self, timeout: float | None = None) -> bool:
        return True

    def submit(self, ask: Ask) -> Ticket:
        error = self.refuse.pop(0) if self.refuse else None
        if error is not None:
            raise error
        ticket = Ticket(ask, self._cancel)
        with self.came:
            self.tickets.append(ticket)
            self.came.notify_all()
        if not self.by_hand:
            self.answer(ticket)
        return ticket

    def answer(self, ticket: Ticket, words: int | None = None) -> None:
        read = {
            "prompt_tokens": getattr(ticket.ask.version, "length", 0),
            "input_tokens": len(ticket.ask.ids),
        }
        do = ticket.ask.do
        if isinstance(do, Choose):
            rest = 0.25 / (len(do.ends) - 1)
            shares = (*(rest for _ in do.ends[1:]), 0.75)
            ticket.put(End("stop", shares=shares, logs=shares, seconds=0.5, **read))
            return
        count = do.max_new_tokens if words is None else words
        for i in range(count):
            logs = (-float(i),) if do.logprobs else ()
            ticket.put(Delta((i + 20,), f"w{i} ", logs))
        ticket.put(
            End("length", text=".", new_tokens=count, seconds=1.0, waited=0.1, first_token=0.2, **read)
        )

    def _cancel(self, ticket: Ticket) -> None:
        with self.came:
            self.cancelled.append(ticket)
            self.came.notify_all()
        ticket.put(End("cancelled"))

    def wait(self, true: Callable[[], bool]) -> None:
        """Until something came or was cancelled so that this holds."""
        with self.came:
            assert self.came.wait_for(true, PATIENCE)


@dataclass
class FakeVersion:
    """pins: how many hold it, shared by all pins of it."""

    card: Mapping[str, Any]
    id: str
    pins: list[int] = field(default_factory=lambda: [0])
    length: int = 4
    released: bool = False
    panel: None = None

    @property
    def name(self) -> str:
        return str(self.card["name"])

    @property
    def form(self) -> Mapping[str, Any]:
        return self.card["task"]  # type: ignore[no-any-return]

    def again(self) -> "FakeVersion":
        self.pins[0] += 1
        return FakeVersion(self.card, self.id, self.pins, self.length)

    def release(self) -> None:
        if not self.released:
            self.released = True
            self.pins[0] -= 1

    def __enter__(self) -> "FakeVersion":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def card(name: str, task: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "name": name, "task": dict(task), "prompt": {"kind": "inputs", "length": 4}, "parameters": 128,
        "backbone": {"name": "llama", "hidden": 32}, "scores": {"test": {"accuracy": 0.875}},
        "recipe": {"task": {"train": "a/secret/path.jsonl"}}, **more,
    }  # fmt: skip


CARDS = [
    card("mood", {"kind": "classification", "name": "reviews", "input": "Review: {text}", "words": ["bad", "good"]}),
    card("pair", {"kind": "classification", "name": "pairs", "input": "{a} and {b}",
                  "words": ["no", "no idea", "yes"]}),
    card("short", {"kind": "text", "name": "sum", "input": "{text} In short:"},
         recipe={"decode": {"max_new_tokens": 3, "sample": True, "temperature": 0.5, "top_k": 7}}),
    card("talk", {"kind": "chat", "name": "talk"}),
]  # fmt: skip


def _short(whole: Mapping[str, Any]) -> dict[str, Any]:
    """A card as a listing has it."""
    task = whole["task"]
    return {
        "task": task["name"], "kind": task["kind"], "words": tuple(task.get("words", ())), "prompt": "inputs",
        "length": 4, "parameters": 128, "scores": whole["scores"],
    }  # fmt: skip


class FakeStore:
    def __init__(self) -> None:
        self.versions = {
            c["name"]: FakeVersion(c, f"{i}" * 64) for i, c in enumerate(copy.deepcopy(CARDS), 1)
        }
        self.aliases = {"best": "mood"}
        self.broken = {"torn": "prompt.safetensors is truncated: copy it again"}
        self.calls: list[tuple[Any, ...]] = []
        self.slow: threading.Event | None = None

    def _found(self, name: str) -> FakeVersion:
        if name in self.broken:
            raise ArtifactError(self.broken[name])
        bare = self.aliases.get(name, name).split("@")[0]
        if bare not in self.versions:
            raise UnknownPrompt(f"no prompt is named {name!r}{nearest(name, self.versions)}")
        return self.versions[bare]

    def pin(self, name: str) -> FakeVersion:
        if self.slow is not None:
            assert self.slow.wait(PATIENCE)
        return self._found(name).again()

    @property
    def pins(self) -> int:
        return sum(version.pins[0] for version in self.versions.values())

    def listing(self) -> Sequence[Listed]:
        names = {name: [a for a, n in self.aliases.items() if n == name] for name in self.versions}
        found = [
            Listed(n, v.id, f"place/{n}", tuple(names[n]), card=_short(v.card))
            for n, v in self.versions.items()
        ]
        return [*found, Listed("torn", "", "place/torn", refused=self.broken["torn"])]

    def listed(self, name: str) -> Listed:
        found = self._found(name)
        return Listed(found.name, found.id, "place", card=_short(found.card))

    def card(self, name: str) -> Mapping[str, Any]:
        return self._found(name).card

    def add(self, files: Mapping[str, bytes], name: str = "") -> Listed:
        self.calls.append(("add", dict(files), name))
        if "card.json" not in files:
            raise ArtifactError("the upload lacks card.json: send it too")
        return Listed(name or "new", "f" * 64, "place/new")

    def delete(self, name: str) -> int:
        self._found(name)
        if name in self.aliases.values():
            raise AskError(f"alias 'best' points to {name!r}: move it first")
        self.calls.append(("delete", name))
        return 1

    def alias(self, alias: str, target: str) -> Listed:
        found = self._found(target)
        self.calls.append(("alias", alias, target))
        return Listed(found.name, found.id, "place", (alias,))

    def unalias(self, alias: str) -> None:
        if alias not in self.aliases:
            raise UnknownPrompt(f"no alias {alias!r}")
        self.calls.append(("unalias", alias))

    def refresh(self) -> None: ...


# -- asking ----------------------------------------------------------------------------------------------------


@dataclass
class Site:
    """One application with its parts. `ask` needs no socket."""

    gate: Gate
    engine: FakeEngine
    store: FakeStore

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(self.gate, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://site") as client:
                return await client.request(method, path, **more)

        return asyncio.run(run())

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.ask("POST", path, json=body)


@pytest.fixture(scope="session")
def llama() -> Backbone:
    return wrap("llama", *tiny.build("llama"))


@pytest.fixture(scope="session")
def bert() -> Backbone:
    return wrap("bert", *tiny.build("bert"))


Make = Callable[..., Site]


@pytest.fixture
def make(llama: Backbone) -> Make:
    def made(options: Options | None = None, backbone: Backbone | None = None) -> Site:
        engine, store = FakeEngine(backbone or llama), FakeStore()
        return Site(make_app(engine, store, options), engine, store)

    return made


@pytest.fixture
def site(make: Make) -> Site:
    return make()


@pytest.fixture(scope="session")
def shared(llama: Backbone) -> Site:
    """One application for a test that asks it often."""
    engine, store = FakeEngine(llama), FakeStore()
    return Site(make_app(engine, store), engine, store)


@contextmanager
def listening_at(gate: Gate, **more: Any) -> Iterator[tuple[str, Server]]:
    """The application on a free port of this machine, in a thread."""
    up = threading.Event()
    where: list[int] = []

    def told(_: str, port: int) -> None:
        where.append(port)
        up.set()

    server = Server(gate, told=told, **more)
    sock = listening("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    assert up.wait(PATIENCE)
    try:
        yield f"http://127.0.0.1:{where[0]}", server
    finally:
        gate.stop()
        server.should_exit = True
        thread.join(PATIENCE)
        sock.close()
        assert not thread.is_alive()


@pytest.fixture
def listen() -> Callable[..., Any]:
    return listening_at
