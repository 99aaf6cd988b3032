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
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from incipit.errors import AskError
from incipit.serve.promises import AnyEngine, AnyStore, Listed, PinnedVersion, State

__all__ = [
    "AnyEngine",
    "AnyStore",
    "Ask",
    "Choose",
    "Delta",
    "End",
    "Event",
    "Listed",
    "PinnedVersion",
    "Reason",
    "Sampling",
    "State",
    "Ticket",
]

Reason: TypeAlias = Literal["stop", "length", "cancelled", "deadline", "overloaded", "error"]


# -- what is asked ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How to write. temperature 0 is greedy, and so is all below 1e-5; otherwise top_k (0: all) and top_p (1: all) cut,
    as in decoding.py.

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

    @property
    def rows(self) -> int:
        """Rows that it is in the batch: one for each member of an ensemble."""
        panel = self.version.panel if self.version is not None else None
        return len(panel.members) if panel is not None else 1

    @property
    def soft(self) -> int:
        """Positions of the prompt; of an ensemble, of all its members."""
        if self.version is None:
            return 0
        panel = self.version.panel
        return sum(m.length for m in panel.members) if panel is not None else self.version.length

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
    "deadline": it had begun; "overloaded": it had not, and would have come too late; "error" with `error` in words for
    the client. text: what was still held back. stopped_by: the stop text or token id that ended it. shares: of each
    candidate, summing to 1 (Choose only), logs: their log-probabilities, choice: the one that is taken (of an ensemble
    that votes, shares are of votes and may be equal). prompt_tokens: positions of the prompt; input_tokens; new_tokens
    (the end token not counted); of an ensemble, of all its members. waited: from submit to the first step; first_token:
    from submit to the first new token (0: none came); seconds: from submit to the end.
    """

    reason: Reason
    text: str = ""
    error: str = ""
    stopped_by: str | int | None = None
    shares: tuple[float, ...] = ()
    logs: tuple[float, ...] = ()
    choice: int | None = None
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
