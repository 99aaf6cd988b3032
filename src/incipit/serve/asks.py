"""The seam between whoever asks (HTTP, a benchmark, a test) and the engine: requests, events, counters, protocols.

    store = Store("library/", backbone)
    engine = Engine(backbone); engine.start()
    with store.pin("sentiment") as version:                 # the newest version now; kept while anybody reads it
        ticket = engine.submit(Ask(ids, version, Sampling(max_new_tokens=16), task="sentiment"))
    for event in ticket: ...                                # Delta, Delta, ..., End; exactly one End, always

No torch here. Times are seconds. An engine runs in threads of its own; everything in this file may be used from any.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from incipit.errors import AskError

Reason: TypeAlias = Literal["stop", "length", "cancelled", "deadline", "error"]


# -- what is asked ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How to write. temperature 0 is greedy; otherwise top_k (0: all) and top_p (1: all) cut, as in decoding.py.

    seed: equal asks with equal seeds get equal answers, whatever the neighbours; None draws one. stop: texts that end
    the answer and are no part of it. stop_ids: tokens that do, besides the model's own end tokens, which count unless
    `ignore_end`. logprobs: whether each token comes with its log-probability (of the model, before temperature).
    """

    max_new_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_end: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        _check(
            ("max_new_tokens", self.max_new_tokens, "at least 1", self.max_new_tokens >= 1),
            ("temperature", self.temperature, "0 (greedy) to 100", 0 <= self.temperature <= 100),
            ("top_p", self.top_p, "above 0 and at most 1", 0 < self.top_p <= 1),
            ("top_k", self.top_k, "at least 0", self.top_k >= 0),
            ("stop", self.stop, "texts that are not empty", all(self.stop)),
        )


@dataclass(frozen=True)
class Choose:
    """Score candidate answers in one pass instead of writing.

    ends: token ids of each candidate; for an encoder () each: its classes are in the prompt's read-out. inputs: what is
    read before each candidate, where a tokenizer joins the input's last word with it; (): Ask.ids before all.
    """

    ends: tuple[tuple[int, ...], ...]
    inputs: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        _check(
            ("choices", len(self.ends), "at least 2", len(self.ends) >= 2),
            (
                "inputs",
                len(self.inputs),
                f"0 or {len(self.ends)}",
                len(self.inputs) in (0, len(self.ends)),
            ),
        )


@dataclass(frozen=True)
class Ask:
    """One request.

    ids: the input's token ids, without prompt (what `encode.question` returns as input_ids). version: what
    `Store.pin` gave, or None for the bare backbone; the engine holds it until the ticket ends, so the caller may
    release its own pin as soon as `submit` has returned. do: write or choose. task: key of the fair queue (normally the
    prompt's name). client: key of the per-client limit ("": not limited). timeout: seconds from `submit` to the end;
    None for no limit.
    """

    ids: tuple[int, ...]
    version: PinnedVersion | None = None
    do: Sampling | Choose = field(default_factory=Sampling)
    task: str = ""
    client: str = ""
    timeout: float | None = None

    def __post_init__(self) -> None:
        _check(("timeout", self.timeout, "above 0", self.timeout is None or self.timeout > 0))


def _check(*rules: tuple[str, object, str, bool]) -> None:
    wrong = [f"{name} = {got!r} must be {needs}" for name, got, needs, fits in rules if not fits]
    if wrong:
        raise AskError("the request: " + "; ".join(wrong))


# -- what comes back -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Delta:
    """New tokens and the text that they complete (text may lag behind tokens: half characters, possible stops).

    The answer is the joined text of all events, `End.text` included. logprobs: one for each token, when asked for.
    """

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class End:
    """The last event of every ticket.

    reason: "stop" an end token, a stop text, or choices scored; "length" max_new_tokens reached; "cancelled";
    "deadline"; "error" with `error` in words for the client. text: what was still held back. stopped_by: the stop text
    or token id that ended it. shares: of each candidate, summing to 1 (Choose only), and logs: their
    log-probabilities. prompt_tokens: positions of the prompt; input_tokens; new_tokens (the end token not counted).
    waited: from submit to the first step; first_token: from submit to the first new token (0: none came); seconds: from
    submit to the end.
    """

    reason: Reason
    text: str = ""
    error: str = ""
    stopped_by: str | int | None = None
    shares: tuple[float, ...] = ()
    logs: tuple[float, ...] = ()
    prompt_tokens: int = 0
    input_tokens: int = 0
    new_tokens: int = 0
    waited: float = 0.0
    first_token: float = 0.0
    seconds: float = 0.0


Event: TypeAlias = Delta | End


class Ticket:
    """The events of one request. Iterate (blocks), iterate asynchronously, or be told through `listen`.

    All events are kept until the ticket is dropped, so each way sees all of them, from the first. The engine calls
    `put`, from its own thread.
    """

    def __init__(self, ask: Ask, cancel: Callable[[Ticket], None] | None = None) -> None:
        self.ask = ask
        self._cancel = cancel
        self._events: list[Event] = []
        self._listeners: list[Callable[[Event], None]] = []
        self._changed = threading.Condition()

    @property
    def ended(self) -> End | None:
        """The last event; None while the request is under way."""
        last = self._events[-1] if self._events else None
        return last if isinstance(last, End) else None

    def cancel(self) -> None:
        """Ask for an early end; the slot is free within one step, and End says "cancelled". Free to call twice."""
        if self._cancel is not None and self.ended is None:
            self._cancel(self)

    def put(self, event: Event) -> bool:
        """Add an event; False when the ticket has ended already, whose End stays the only one."""
        with self._changed:
            if self.ended is not None:
                return False
            self._events.append(event)
            for listener in self._listeners:
                with contextlib.suppress(Exception):  # who listens badly (a closed loop) harms nobody else
                    listener(event)
            if isinstance(event, End):
                self._listeners.clear()
            self._changed.notify_all()
            return True

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` with every event, past ones first, in order; from the engine's thread, so it must not block
        (in asyncio: lambda e: loop.call_soon_threadsafe(queue.put_nowait, e))."""
        with self._changed:
            for event in self._events:
                listener(event)
            if self.ended is None:
                self._listeners.append(listener)

    def __iter__(self) -> Iterator[Event]:
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._events) > seen)  # noqa: B023 (runs at once)
                event = self._events[seen]
            seen += 1
            yield event
            if isinstance(event, End):
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def tell(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, event)

        self.listen(tell)
        try:
            while True:
                event = await queue.get()
                yield event
                if isinstance(event, End):
                    return
        finally:
            with self._changed:
                if tell in self._listeners:
                    self._listeners.remove(tell)

    def wait(self, timeout: float | None = None) -> End:
        """Block until the end. Raises TimeoutError when that takes longer than `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.ended is not None, timeout):
                raise TimeoutError(f"the request has not ended within {timeout} s")
            assert self.ended is not None
            return self.ended

    @property
    def tokens(self) -> tuple[int, ...]:
        """New tokens so far."""
        return tuple(t for e in list(self._events) if isinstance(e, Delta) for t in e.tokens)

    @property
    def text(self) -> str:
        """Text so far."""
        return "".join(e.text for e in list(self._events))


# -- who answers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What the engine does now, and what it has done since it started (counters only grow, restarts included).

    ready: whether a request would be taken; `why` says why not. mode: "batched" or "rows" (each row by itself: a check
    at load found that batches change logits here). slots, tokens_reserved / tokens: rows and positions of the KV cache.
    rows_per_step, tasks_per_step: how many decode steps had so many rows, so many distinct versions (bare backbone
    included). finished by End.reason, refused by error class. cache_*: prompts as the model reads them.
    """

    ready: bool = False
    why: str = ""
    mode: str = ""
    running: int = 0
    waiting: int = 0
    slots: int = 0
    tokens: int = 0
    tokens_reserved: int = 0
    steps: int = 0
    rows_per_step: Mapping[int, int] = field(default_factory=dict)
    tasks_per_step: Mapping[int, int] = field(default_factory=dict)
    input_tokens: int = 0
    new_tokens: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    restarts: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_prompts: int = 0
    cache_bytes: int = 0
    cache_max_bytes: int = 0


class AnyEngine(Protocol):
    """What HTTP needs of an engine (incipit.serve.engine.Engine is the one there is)."""

    @property
    def ready(self) -> bool:
        """Whether it takes requests: started, checked, not draining, not stuck."""

    @property
    def why(self) -> str:
        """Why it is not ready; ""."""

    @property
    def backbone(self) -> Any:
        """The Backbone (tokenizer, geometry, name)."""

    def start(self) -> None:
        """Start the threads; returns at once. Not ready before the self-check has passed."""

    def submit(self, ask: Ask) -> Ticket:
        """Queue a request; never blocks for longer than a lock.

        Raises AskError, TooLong, ClientLimit, Saturated, Draining, EngineDown; nothing is left behind then.
        """

    def state(self) -> State:
        """Counters, consistent among themselves; cheap enough for every scrape."""

    def drain(self) -> None:
        """Take no more requests, finish those that were taken; returns at once and is for good."""

    def drained(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs or waits; False when that took longer than `timeout` seconds."""

    def stop(self) -> None:
        """End everything: open tickets get End("cancelled"), threads are joined. Free to call twice."""


@dataclass(frozen=True)
class Listed:
    """A version as a listing shows it. id: 64 hex digits, the sha256 of its card (which holds the tensors' hashes).

    name: what clients ask for. aliases: other names for it now. current: whether `name` means this version.
    card: name, task, kind, backbone, parameters, prompt kind and length, words, scores. refused: why it cannot be
    served (damaged, another backbone, ...); "" when it can, or was not looked at closer yet.
    """

    name: str
    id: str
    place: str
    aliases: tuple[str, ...] = ()
    current: bool = True
    card: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""


class PinnedVersion(Protocol):
    """One version of a prompt, loaded and held. A context manager: leaving it releases this pin."""

    @property
    def name(self) -> str:
        """The artifact's name (not the alias that was asked for)."""

    @property
    def id(self) -> str:
        """64 hex digits; see Listed."""

    @property
    def card(self) -> Mapping[str, Any]:
        """The whole card.json."""

    @property
    def form(self) -> Mapping[str, Any]:
        """card["task"]: what `questions.ask` takes."""

    @property
    def length(self) -> int:
        """Positions that the prompt takes."""

    def again(self) -> PinnedVersion:
        """Another pin of the same version."""

    def release(self) -> None:
        """Let go of this pin; free to call twice."""

    def __enter__(self) -> PinnedVersion: ...

    def __exit__(self, *_: object) -> None: ...


class AnyStore(Protocol):
    """What HTTP needs of a prompt store (incipit.serve.store.Store is the one there is). Safe from any thread.

    pin, add and card may read the disk: in asyncio call them through a thread.
    """

    def pin(self, name: str) -> PinnedVersion:
        """The version that a name, an alias, `name@id` or `name@` and the first 8 or more digits of an id mean now.

        Raises UnknownPrompt (names the nearest), ArtifactError (why it is refused).
        """

    def listing(self) -> Sequence[Listed]:
        """Every version, sorted by name; from memory."""

    def card(self, name: str) -> Mapping[str, Any]:
        """The whole card.json; raises like `pin`, but needs no tensors."""

    def add(self, files: Mapping[str, bytes], name: str = "") -> Listed:
        """Put an uploaded artifact (card.json, prompt.safetensors) into the library; it becomes current for its name.

        Checked in full before it is written. The same bytes twice are one version. Raises ArtifactError.
        """

    def delete(self, name: str) -> int:
        """Forget a name with all its versions, or `name@id` alone; returns how many. Running requests keep theirs.
        Raises UnknownPrompt; AskError while an alias points there."""

    def alias(self, alias: str, target: str) -> Listed:
        """From now on `alias` means what `target` means now (its version is fixed). Atomic, kept on disk.
        Raises UnknownPrompt, ArtifactError (target is refused), AskError (alias is a prompt's own name)."""

    def unalias(self, alias: str) -> None:
        """Forget an alias; raises UnknownPrompt."""

    def refresh(self) -> None:
        """Look at the library folder again."""
