"""One engine without threads: submit, turn, turn, ...; the same with a model or with a simulated one and its clock.

A turn ends what is cancelled or late, plans, runs the plan outside of the lock, and hands out what came of it.
"""

from __future__ import annotations

import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from incipit.errors import AskError, ServeError, TooLong
from incipit.serve.asks import Ask, Choose, Delta, End, Event, Reason, Sampling, State, Ticket
from incipit.serve.executor import CacheUse, Executor, Nobody, Row, Scored, Took
from incipit.serve.panel import voted
from incipit.serve.scheduler import Job, Limits, Plan, Scheduler
from incipit.serve.writing import Writing

Out = list[tuple[Ticket, Event]]


class Core:
    """Scheduler and executor (None: not there yet). clock: seconds. decode: ids -> text. ends: ids that end an answer.

    `submit`, `cancel` and `state` may be called from any thread; `turn` from one.
    """

    def __init__(
        self,
        executor: Executor | None,
        clock: Callable[[], float],
        decode: Callable[[Sequence[int]], str],
        ends: Sequence[int] = (),
        limits: Limits | None = None,
    ) -> None:
        self.clock, self.decode, self.ends = clock, decode, frozenset(ends)
        self.executor: Executor = executor or Nobody()
        self.limits = limits or Limits()
        self.scheduler = Scheduler(self.executor, self.limits)
        self.lock = threading.RLock()
        self.work = threading.Condition(self.lock)  # notified when there is something to do
        self.generation = 0  # grows when all that runs is given up
        self.jobs: dict[Ticket, Job] = {}
        self.steps = self.input_tokens = self.new_tokens = self.restarts = 0
        self.rows_per_step: Counter[int] = Counter()
        self.tasks_per_step: Counter[int] = Counter()
        self.finished: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._before = CacheUse()  # of executors that are gone
        self._since: float | None = None  # when the step before ended, where nothing was waited for since

    # -- from any thread -------------------------------------------------------------------------------------------

    def submit(self, ask: Ask) -> Ticket:
        """Queue a request. Raises AskError, TooLong, ClientLimit, Saturated."""
        with self.lock:
            if ask.rows > 1 and isinstance(ask.do, Sampling):
                self._check_votes(ask)
                return voted(self.submit, ask)
            try:
                job = self._job(ask)
            except ServeError as error:
                self.refuse(error)
                raise
            self.scheduler.push(job)
            self.jobs[job.ticket] = job
            self.work.notify_all()
        return job.ticket

    def _check_votes(self, ask: Ask) -> None:
        """AskError where a client could never have so many rows open as the ensemble has members."""
        if ask.client and ask.rows > self.limits.client:
            error = AskError(
                f"an ensemble of {ask.rows} that writes needs {ask.rows} rows at once, a client has "
                f"{self.limits.client} here: ask its members one by one"
            )
            self.refuse(error)
            raise error

    def refuse(self, error: ServeError) -> None:
        """Count a request that is not taken."""
        with self.lock:
            self.refused[type(error).__name__] += 1

    def _job(self, ask: Ask) -> Job:
        inputs = ask.do.inputs if isinstance(ask.do, Choose) and ask.do.inputs else (ask.ids,)
        if not all(inputs):
            raise AskError("the input is empty: give it some text")
        if why := self.executor.fits(ask):
            raise TooLong(why)
        cost = self.executor.cost(ask) * ask.rows
        seed = ask.do.seed if isinstance(ask.do, Sampling) else 0
        stop = ask.do.stop if isinstance(ask.do, Sampling) else ()
        now = self.clock()
        job = Job(
            Ticket(ask, self.cancel),
            Row(ask, random.getrandbits(32) if seed is None else seed),
            cost,
            now,
            None if ask.timeout is None else now + ask.timeout,
            Writing(self.decode, stop),
        )
        self.scheduler.check(job, ask.timeout)
        if ask.version is not None:
            job.row.ask = job.ticket.ask = replace(ask, version=ask.version.again())
        return job

    def cancel(self, ticket: Ticket) -> None:
        """End a request early: at once where it waits, before the next step where it runs."""
        out: Out = []
        with self.lock:
            job = self.jobs.get(ticket)
            if job is not None and job in self.scheduler.running:
                job.ending = "cancelled"
                self.work.notify_all()
            elif job is not None:
                out.append(self._ended(job, "cancelled"))
        _deliver(out)

    def state(self) -> State:
        """Counters; `ready` and `why` are the engine's to say."""
        with self.lock:
            use, before, plan = self.executor.cache(), self._before, self.scheduler
            return State(
                mode=self.executor.mode,
                running=len(plan.running),
                waiting=len(plan.queues),
                slots=plan.slots,
                tokens=plan.tokens,
                tokens_reserved=plan.reserved,
                steps=self.steps,
                rows_per_step=dict(self.rows_per_step),
                tasks_per_step=dict(self.tasks_per_step),
                input_tokens=self.input_tokens,
                new_tokens=self.new_tokens,
                finished=dict(self.finished),
                refused=dict(self.refused),
                restarts=self.restarts,
                cache_hits=before.hits + use.hits,
                cache_misses=before.misses + use.misses,
                cache_prompts=use.prompts,
                cache_bytes=use.bytes,
                cache_max_bytes=use.max_bytes,
                process=self.executor.process,
            )

    # -- from the engine's thread ----------------------------------------------------------------------------------

    def turn(self, generation: int | None = None) -> bool:
        """One step; False when there was nothing to do. What the executor raises is passed on: see `give_up`.

        generation: do nothing unless it is still this one.
        """
        out: Out = []
        with self.lock:
            if generation not in (None, self.generation):
                return False
            generation, executor = self.generation, self.executor
            for job, reason in self.scheduler.due(self.clock()):
                out.append(self._ended(job, reason))
            plan = self.scheduler.plan()
            start = self.clock()
            for job in (*(j for j, _ in plan.rows), *plan.scores):
                job.begun = start if job.begun is None else job.begun
        _deliver(out)
        if not plan:
            self._since = None
            executor.rest()
            return bool(out)
        refused = {j: why for j, _ in plan.rows if j.row.held is None and (why := executor.enter(j.row))}
        plan.rows = [(j, n) for j, n in plan.rows if j not in refused]
        scored = executor.score([j.row.ask for j in plan.scores]) if plan.scores else []
        took = executor.step([(j.row, n) for j, n in plan.rows]) if plan.rows else []
        out = []
        with self.lock:
            if generation == self.generation:  # otherwise all of it was given up meanwhile
                out += [self._ended(job, "error", why) for job, why in refused.items()]
                self._apply(plan, took, scored, start, out)
        _deliver(out)
        return True

    def _apply(
        self, plan: Plan, took: Sequence[Took], scored: Sequence[Scored], start: float, out: Out
    ) -> None:
        now = self.clock()
        self.steps += 1
        self.scheduler.ready.keep(self.executor.cache().prompts)
        done = plan.prompts
        if plan.rows:
            self.rows_per_step[len(plan.rows)] += 1
            versions = {j.row.ask.version.id if j.row.ask.version else "" for j, _ in plan.rows}
            self.tasks_per_step[len(versions)] += 1
        for job, one in zip(plan.scores, scored, strict=True):
            self.input_tokens += job.size
            done += job.cost
            out.append(self._chosen(job, one))
        for (job, count), each in zip(plan.rows, took, strict=True):
            self.input_tokens += count
            job.row.read += count
            done += max(1, count)
            if each.error:
                out.append(self._ended(job, "error", each.error))
            elif each.token is not None:
                self._wrote(job, each, now, out)
        since, self._since = self._since, now
        self.scheduler.stepped(len(plan.rows), done, now - (start if since is None else since))

    def _chosen(self, job: Job, scored: Scored) -> tuple[Ticket, Event]:
        if scored.error:
            return self._ended(job, "error", scored.error)
        job.first = self.clock()
        ticket, end = self._ended(job, "stop")
        shares, choice = _shares(scored.logs), scored.choice
        choice = shares.index(max(shares)) if choice is None else choice
        return ticket, replace(end, shares=shares, logs=scored.logs, choice=choice)

    def _wrote(self, job: Job, took: Took, now: float, out: Out) -> None:
        """A row has a new token: hand it out, and end the row where it is over."""
        do, row, token = job.row.ask.do, job.row, took.token
        assert isinstance(do, Sampling) and token is not None
        job.first = now if job.first is None else job.first
        stops = token in do.stop_ids
        if stops or (token in self.ends and not do.ignore_end):
            out.append(self._ended(job, "stop", stopped_by=token if stops else None))
            return
        row.new.append(token)
        self.new_tokens += 1
        text = job.writing.take(token)
        out.append((job.ticket, Delta((token,), text, (took.logprob,) if do.logprobs else ())))
        if job.writing.stopped is not None:
            out.append(self._ended(job, "stop", stopped_by=job.writing.stopped))
        elif len(row.new) >= do.max_new_tokens:
            out.append(self._ended(job, "length"))

    def _ended(
        self, job: Job, reason: Reason, error: str = "", stopped_by: str | int | None = None
    ) -> tuple[Ticket, End]:
        """Take a job out and give back all that it held."""
        now, ask = self.clock(), job.row.ask
        text = job.writing.end()
        if reason == "length" and job.writing.stopped is not None:  # it was in what was held back
            reason, stopped_by = "stop", job.writing.stopped
        if self.scheduler.drop(job) and job.row.held is not None:
            self.executor.leave(job.row)
        if job.begun is not None and reason in ("stop", "length"):
            self.scheduler.lived(job, now - job.begun)
        del self.jobs[job.ticket]
        if not self.jobs:
            self.work.notify_all()  # whoever waits for the drain
        if ask.version is not None:
            ask.version.release()
        self.finished[reason] += 1
        return job.ticket, End(
            reason,
            text,
            error,
            stopped_by,
            prompt_tokens=ask.soft,
            input_tokens=len(ask.ids) * ask.rows,
            new_tokens=len(job.row.new),
            waited=(job.begun if job.begun is not None else now) - job.born,
            first_token=job.first - job.born if job.first is not None else 0.0,
            seconds=now - job.born,
        )

    def give_up(self, reason: Reason, why: str) -> None:
        """End every request; what the executor does now is nobody's any more. Until `replace` there is none."""
        out: Out = []
        with self.lock:
            self.generation += 1
            use, before = self.executor.cache(), self._before
            self._before = CacheUse(before.hits + use.hits, before.misses + use.misses)
            self.executor = Nobody()  # it may be stuck: nothing is given back to it
            for job in list(self.scheduler):
                out.append(self._ended(job, reason, why))
        self.replace(self.executor)
        _deliver(out)

    def replace(self, executor: Executor) -> None:
        """Go on with another executor; nothing is under way."""
        with self.lock:
            assert not self.jobs, "give_up first"
            self.executor, self._since = executor, None
            before, self.scheduler = self.scheduler, Scheduler(executor, self.limits)
            self.scheduler.pace, self.scheduler.slowdown = before.pace, before.slowdown

    def sleep(self, seconds: float) -> None:
        """Wait for work, for so long at most, or until the next deadline."""
        with self.work:
            if self.jobs:
                due = self.scheduler.next_deadline()
                seconds = min(seconds, due - self.clock()) if due is not None else seconds
            if seconds > 0:
                self.work.wait(seconds)


def _shares(logs: Sequence[float]) -> tuple[float, ...]:
    """softmax."""
    top = max(logs)
    weights = [math.exp(log - top) for log in logs]
    total = sum(weights)
    return tuple(w / total for w in weights)


def _deliver(out: Out) -> None:
    """Outside of the lock: a listener may call back."""
    for ticket, event in out:
        ticket.put(event)
