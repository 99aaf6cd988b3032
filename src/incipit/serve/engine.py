"""The engine: a Core in a thread of its own, and a watchdog that notices when it has died or is stuck.

When it fails, every request ends with an error, the engine is not ready, and it comes back with fresh memory after the
self-check has passed again. The weights are frozen and no forward pass writes on them, so a new thread may use them
while an old one still hangs in a step that nobody waits for.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from incipit.backbones import Backbone
from incipit.errors import Draining, EngineDown, IncipitError, ServeError
from incipit.serve import check
from incipit.serve.asks import Ask, State, Ticket
from incipit.serve.core import Core
from incipit.serve.executor import Executor
from incipit.serve.scheduler import Limits
from incipit.serve.silence import Silence

TICK = 0.1  # seconds between two looks of the watchdog
STUCK = (
    1.5  # seconds that a step may take before it counts as stuck, or 8 times the longest one that ever ended
)
TEXTS = 2**14  # texts of a few tokens that are kept: most of an answer is decoded as pairs that came before
BACK_OFF = (0.1, 5.0)  # seconds between attempts to come back: the first, and the longest


@dataclass
class _Beat:
    """What a thread does: how many turns it has begun, and whether one is under way."""

    turns: int = 0
    busy: bool = False


class Engine:
    """Answers asks over one frozen backbone. sizes: rows (slots), room (positions of a slot), cache_bytes (of prompts;
    0: a sixteenth of the memory).

    make: gives an executor, and is asked again after every failure; by default the fastest one that is exact.
    restarts: how often one failed before, in another process.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        limits: Limits | None = None,
        stuck_after: float = STUCK,
        make: Callable[[], Executor] | None = None,
        clock: Callable[[], float] = time.monotonic,
        restarts: int = 0,
        **sizes: Any,
    ) -> None:
        self._backbone, self.stuck_after = backbone, stuck_after
        self._make = make or (lambda: self._fastest(**sizes))
        self._texts = lru_cache(TEXTS)(self._decoded)
        self._core = Core(None, clock, self._text, backbone.eos_ids, limits)
        self._core.restarts = restarts
        self._lock = threading.RLock()
        self._why = "not started"
        self._up = self._draining = self._stopped = False
        self._generation = 0
        self._thread: threading.Thread | None = None
        self._watchdog: threading.Thread | None = None
        self._ended = threading.Event()
        self._beat = _Beat()
        self._longest = 0.0

    def _text(self, ids: Sequence[int]) -> str:
        return self._texts(tuple(ids))

    def _decoded(self, ids: tuple[int, ...]) -> str:
        text: str = self._backbone.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _fastest(self, **sizes: Any) -> Executor:
        return check.executor(self._backbone, **sizes)[0]

    # -- what everybody may call -----------------------------------------------------------------------------------

    @property
    def backbone(self) -> Backbone:
        """The model."""
        return self._backbone

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return not self.why

    @property
    def why(self) -> str:
        """Why it takes none; ""."""
        if self._stopped:
            return "stopped"
        if self._draining:
            return "the server is shutting down"
        return "" if self._up else self._why

    def start(self) -> None:
        """Start engine and watchdog; returns at once."""
        with self._lock:
            if self._watchdog is None and not self._stopped:
                self._why = "the model is being checked"
                self._begin()
                self._watchdog = threading.Thread(target=self._watch, name="incipit-watchdog", daemon=True)
                self._watchdog.start()

    def submit(self, ask: Ask) -> Ticket:
        """Queue a request. Raises AskError, TooLong, ClientLimit, Saturated, Draining, EngineDown."""
        error: ServeError | None = None
        if self._draining or self._stopped:
            error = Draining("the server is shutting down; try again at another one, or later", 1.0)
        elif not self._up:
            error = EngineDown(f"the engine is not ready: {self._why}; try again", 1.0)
        if error is not None:
            self._core.refuse(error)
            raise error
        return self._core.submit(ask)

    def state(self) -> State:
        """Counters."""
        return replace(self._core.state(), ready=self.ready, why=self.why)

    def drain(self) -> None:
        """Take no more requests; those that were taken go on."""
        self._draining = True

    def drained(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs or waits; False when that takes longer than `timeout` seconds."""
        with self._core.work:
            return self._core.work.wait_for(lambda: not self._core.jobs, timeout)

    def stop(self) -> None:
        """End all requests and threads."""
        with self._lock:
            self._stopped, self._up = True, False
            self._generation += 1
            threads = [t for t in (self._thread, self._watchdog) if t is not None]
        self._ended.set()
        self._core.give_up("cancelled", "the server was stopped")
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(2 * self.stuck_after)  # one that is stuck is left to the end of the process

    # -- the engine's thread ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._generation += 1
        self._beat = _Beat()
        self._thread = threading.Thread(
            target=self._run, args=(self._generation, self._beat), name="incipit-engine", daemon=True
        )
        self._thread.start()

    def _current(self, generation: int) -> bool:
        return generation == self._generation and not self._stopped

    def _run(self, generation: int, beat: _Beat) -> None:
        pause = BACK_OFF[0]
        while self._current(generation):
            try:
                executor = self._make()
            except BaseException as error:  # a panic of a tokenizer is no Exception
                self._why = f"it does not come up ({_short(error)})"
                self._ended.wait(pause)
                pause = min(2 * pause, BACK_OFF[1])
                continue
            with self._lock:
                if not self._current(generation):
                    return
                self._core.replace(executor)
                turns = self._core.generation
                self._up, self._why = True, ""
            try:
                self._turn(generation, turns, beat)
            except BaseException as error:  # whatever it is, clients must hear of it
                logging.getLogger("incipit.serve").error("engine failed", exc_info=error)
                self._fail(generation, f"the engine failed ({_short(error)})")
                self._ended.wait(pause)
                pause = min(2 * pause, BACK_OFF[1])

    def _turn(self, generation: int, turns: int, beat: _Beat) -> None:
        while self._current(generation):
            beat.turns, beat.busy = beat.turns + 1, True
            begun = time.monotonic()
            try:
                busy = self._core.turn(turns)
            finally:
                beat.busy = False
                self._longest = max(self._longest, time.monotonic() - begun)
            if not busy:
                self._core.sleep(TICK)

    def _fail(self, generation: int, why: str) -> None:
        """End all requests of a generation, unless somebody has done so already."""
        with self._lock:
            if not self._current(generation) or not self._up:
                return
            self._up, self._why = False, why
            self._core.restarts += 1
        self._core.give_up("error", f"{why}; it is coming back, try again")

    # -- the watchdog ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Look every TICK, whether a turn takes too long."""
        last, waited, silence = (0, 0), 0.0, Silence(2 * TICK)
        while not self._ended.wait(TICK):
            passed = silence.look(self._core.executor.process)
            with self._lock:
                beat, thread, generation = self._beat, self._thread, self._generation
            seen = generation, beat.turns
            waited = waited + passed if seen == last and beat.busy else 0.0
            last = seen
            if not self._up:
                continue
            if thread is not None and not thread.is_alive():
                self._again(generation, "the engine's thread has died")
            elif waited > max(self.stuck_after, 8 * self._longest):
                self._again(generation, f"a step has taken more than {self.stuck_after:.1f} s")

    def _again(self, generation: int, why: str) -> None:
        self._fail(generation, why)
        with (
            self._lock,
            contextlib.suppress(RuntimeError),
        ):  # no thread can be started while the interpreter ends
            if self._current(generation):
                self._begin()


def _short(error: BaseException) -> str:
    """A line for a client: our own errors in words, others by their kind alone."""
    return str(error).splitlines()[0] if isinstance(error, IncipitError) else type(error).__name__
