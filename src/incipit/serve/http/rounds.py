"""A round: the rows of one HTTP request on their way through the engine, from the prompt's pin to the last End."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from incipit.errors import ClientLimit, Saturated
from incipit.serve.asks import AnyEngine, AnyStore, Ask, Delta, End, Event, PinnedVersion, Ticket
from incipit.serve.http.meters import Meters
from incipit.serve.http.refusals import Refusal
from incipit.serve.http.rows import Reader

T = TypeVar("T")
THREADS = 16  # that may wait for a disk or a bucket at once
FOR_ONE = 4  # of them, for one prompt: a slow one must not hold up the others


@dataclass
class Called:
    """One HTTP request as the log and the limits know it. client: whose; the others are filled in. seconds: allowed."""

    id: str
    client: str
    model: str = ""
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Bell:
    """Wakes rounds of one event loop from the engine's thread: one call of the loop for all that a step brings."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._rung: deque[asyncio.Event] = deque()
        self._called = False

    def ring(self, event: asyncio.Event) -> None:
        """Set an event of the loop, soon."""
        self._rung.append(event)
        if not self._called and not self.loop.is_closed():
            self._called = True
            self.loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._called = False  # before the rest: what is rung from now on calls again
        while self._rung:
            self._rung.popleft().set()


class Desk:
    """Engine, store and tokenizer, as the endpoints use them. backbone_name: what clients call the bare model."""

    def __init__(
        self,
        engine: AnyEngine,
        store: AnyStore,
        meters: Meters,
        *,
        backbone_name: str,
        timeout: float,
        new: int,
        rows: int,
    ) -> None:
        self.engine, self.store, self.meters = engine, store, meters
        self.reader = Reader(engine.backbone)
        self.backbone_name, self.timeout, self.new, self.rows = backbone_name, timeout, new, rows
        self.created = int(time.time())
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="incipit-http")
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._bell: Bell | None = None

    def bell(self) -> Bell:
        """That of the running loop."""
        if self._bell is None or self._bell.loop is not asyncio.get_running_loop():
            self._bell = Bell()
        return self._bell

    async def aside(self, job: Callable[[], T]) -> T:
        """Run what may wait for a disk in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, job)

    async def take(
        self,
        model: str,
        ask: Callable[[Reader, PinnedVersion | None], Sequence[Ask]],
        called: Called,
        timeout: float | None,
        live: bool = False,
    ) -> Round:
        """Pin the prompt, make its rows, submit them. Raises Refusal, IncipitError; nothing is left behind then.

        live: tell of tokens as they come, and not only of ends.
        """
        given = called.seconds = min(timeout or self.timeout, self.timeout)
        until = time.monotonic() + given
        turn = self._turns.setdefault(model, asyncio.Semaphore(FOR_ONE))
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                await turn.acquire()
        except TimeoutError as error:
            raise Refusal.crowded(given) from error
        job = asyncio.ensure_future(self.aside(lambda: self._pinned(model, ask)))
        job.add_done_callback(lambda _: turn.release())
        try:
            done, _ = await asyncio.wait({job}, timeout=max(0.0, until - time.monotonic()))
        except BaseException:
            job.add_done_callback(_let_go)
            raise
        if not done:
            job.add_done_callback(_let_go)
            raise Refusal.crowded(given)
        version, asks = job.result()
        called.model = version.name if version is not None else self.backbone_name
        called.rows = len(asks)
        own = [replace(a, client=called.client) for a in asks]
        taken = Round(self, version, own, until, called, live)
        try:
            if len(asks) > self.rows:
                said = f"{len(asks)} answers in one request, at most {self.rows} are allowed: send several requests"
                raise Refusal(422, said, code="too_many_rows")
            taken.start()
        except BaseException:
            taken.close()
            raise
        return taken

    def _pinned(
        self, model: str, ask: Callable[[Reader, PinnedVersion | None], Sequence[Ask]]
    ) -> tuple[PinnedVersion | None, Sequence[Ask]]:
        version = None if model == self.backbone_name else self.store.pin(model)
        try:
            return version, ask(self.reader, version)
        except BaseException:
            if version is not None:
                version.release()
            raise

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _let_go(job: asyncio.Future[tuple[PinnedVersion | None, Any]]) -> None:
    """Release what came too late."""
    if not job.cancelled() and job.exception() is None and job.result()[0] is not None:
        job.result()[0].release()  # type: ignore[union-attr]


class Round:
    """The rows of one request. At most `Desk.rows` of them; those beyond a client's own limit wait for the others."""

    def __init__(
        self,
        desk: Desk,
        version: PinnedVersion | None,
        asks: Sequence[Ask],
        until: float,
        called: Called,
        live: bool,
    ) -> None:
        self.desk, self.version, self.asks, self.until, self.called = desk, version, asks, until, called
        self.live = live
        self.ends: list[End | None] = [None] * len(asks)
        self._waiting = deque(range(len(asks)))
        self._tickets: dict[int, Ticket] = {}
        self._found: deque[tuple[int, Event, float]] = deque()
        self._more, self._bell = asyncio.Event(), desk.bell()
        self._last: dict[int, float] = {}
        self.stopped = False

    @property
    def fingerprint(self) -> str:
        """Which version answers, whatever the name that was asked for."""
        return "" if self.version is None else f"{self.version.name}@{self.version.id[:12]}"

    def start(self) -> None:
        """Submit what the engine takes; raises what it raises for the first row."""
        while self._waiting:
            index = self._waiting[0]
            left = self.until - time.monotonic()
            if left <= 0:
                raise Refusal.crowded(self.called.seconds)
            try:
                ticket = self.desk.engine.submit(replace(self.asks[index], timeout=left))
            except (ClientLimit, Saturated):
                if self._tickets:  # its own rows are in the way: the rest comes when they have ended
                    return
                raise
            except BaseException:
                self.cancel()
                raise
            self._waiting.popleft()
            self._tickets[index] = ticket
            ticket.listen(partial(self._tell, index))

    def _tell(self, index: int, event: Event) -> None:
        """From the engine's thread."""
        self._found.append((index, event, time.perf_counter()))
        if self.live or isinstance(event, End):
            self._bell.ring(self._more)

    async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """What happened, in order: all that there is, then the next; ends after the last End.

        Raises Refusal or IncipitError where a row that had to wait is not taken.
        """
        while any(end is None for end in self.ends) and not self.stopped:
            await self._more.wait()
            self._more.clear()
            found = [self._found.popleft() for _ in range(len(self._found))]
            for index, event, at in found:
                self._note(index, event, at)
            if self._waiting and any(isinstance(event, End) for _, event, _ in found):
                self.start()
            yield [(index, event) for index, event, _ in found]

    def _note(self, index: int, event: Event, at: float) -> None:
        if isinstance(event, Delta):
            if index in self._last:
                self.desk.meters.between(at - self._last[index], len(event.tokens))
            self._last[index] = at
            return
        self.ends[index] = event
        self.called.tokens += event.new_tokens
        del self._tickets[index]
        self.desk.meters.ended(self.asks[index], event, self.called)

    async def whole(self) -> list[End]:
        """Wait for all rows. Raises the Refusal of the first one that failed; then the others are cancelled."""
        async for found in self.events():
            for _, event in found:
                refusal = Refusal.ended(event) if isinstance(event, End) else None
                if refusal is not None:
                    raise refusal
        return [end for end in self.ends if end is not None]

    def cancel(self) -> None:
        """Stop every row that has not ended."""
        self._waiting.clear()
        for ticket in list(self._tickets.values()):
            ticket.cancel()

    def close(self) -> None:
        """Cancel what is left and let go of the prompt; free to call twice."""
        self.stopped = True
        self.cancel()
        if self.version is not None:
            self.version.release()


async def unless_gone(receive: Any, round_: Round, job: Any) -> Any:
    """The result of `job`; when the client goes away first, the round is cancelled and the job with it: then None."""
    work = asyncio.ensure_future(job)
    watch = asyncio.ensure_future(gone(receive))
    try:
        done, _ = await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if work in done:
            return work.result()
        round_.close()
        return None
    finally:
        for task in (work, watch):
            if not task.done():
                task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def gone(receive: Any) -> None:
    """Return when the client has closed its side."""
    while (await receive())["type"] != "http.disconnect":
        pass
