"""Who runs next: admission, fair shares, chunks of prefill, deadlines. Pure bookkeeping, no model and no threads.

Everything that a running request may ever need is reserved when it is admitted, so nothing is thrown out later.
Times are seconds of any clock; costs are positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from incipit.errors import ClientLimit, Saturated
from incipit.serve.asks import Choose, Reason, Sampling, Ticket
from incipit.serve.executor import Executor, Row
from incipit.serve.queues import FairQueues
from incipit.serve.ready import Ready
from incipit.serve.slowdown import Slowdown
from incipit.serve.writing import Writing

_SAFE = 1.7  # how much longer than estimated a request is thought to take, when it comes
_SURE = 1.2  # the same, when it would begin
_HALF_LIFE = 1.0  # seconds of work after which a measured rate counts half


@dataclass(frozen=True)
class Limits:
    """chunk: positions of inputs and prompts that one step reads at most, so that those who write are not held up.
    waiting: requests in all queues. client: open requests of one client. spare: slots that are left to tasks that run
    nothing."""

    chunk: int = 512
    waiting: int = 256
    client: int = 64
    spare: int = 2


@dataclass(eq=False)
class Job:
    """A request on its way. begun, first: when it took its first step and had its first token."""

    ticket: Ticket
    row: Row
    cost: int
    born: float
    deadline: float | None
    writing: Writing
    begun: float | None = None
    first: float | None = None
    ending: Reason | None = None  # decided elsewhere (cancelled), carried out between steps

    @property
    def task(self) -> str:
        """Key of its queue."""
        return self.row.ask.task

    @property
    def writes(self) -> bool:
        """Whether it takes a slot; one that chooses is done in one pass."""
        return isinstance(self.row.ask.do, Sampling)

    @property
    def size(self) -> int:
        """Input positions of its own."""
        ask = self.row.ask
        if isinstance(ask.do, Choose):
            return ask.rows * (max(1, *map(len, ask.do.inputs or (ask.ids,))) + sum(map(len, ask.do.ends)))
        return max(1, len(ask.ids))

    @property
    def steps(self) -> int:
        """Steps that it takes at most, where its input is not read in parts."""
        do = self.row.ask.do
        return 1 + do.max_new_tokens if isinstance(do, Sampling) else 1


@dataclass
class Plan:
    """One step: rows with how many input positions they read (0: they write on), and requests to score.

    prompts: positions of prompts that must be read before.
    """

    rows: list[tuple[Job, int]] = field(default_factory=list)
    scores: list[Job] = field(default_factory=list)
    prompts: int = 0

    def __bool__(self) -> bool:
        return bool(self.rows or self.scores)


@dataclass
class Pace:
    """What is done per second of work, forgetting slowly."""

    done: float = 0.0
    spent: float = 0.0
    steps: float = 0.0

    def add(self, done: float, seconds: float) -> None:
        """Count the work of a step and the time that it took."""
        keep = 0.5 ** (seconds / _HALF_LIFE)
        self.done, self.spent = self.done * keep + done, self.spent * keep + seconds
        self.steps = self.steps * keep + 1

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.spent / self.steps if self.steps else 0.0

    def seconds(self, work: float) -> float:
        """How long this much work takes; 0 while nothing is known."""
        return work * self.spent / self.done if self.done > 0 else 0.0


class Scheduler:
    """Queues, slots and their accounts. Not thread-safe: its owner holds a lock."""

    def __init__(self, executor: Executor, limits: Limits) -> None:
        self.limits = limits
        self.slots, self.tokens, self.chunks = executor.slots, executor.tokens, executor.chunks
        self.queues: FairQueues[Job] = FairQueues()
        self.running: dict[Job, None] = {}  # in order of admission
        self.reserved = 0
        self.clients: dict[str, int] = {}
        self.tasks: dict[str, int] = {}  # slots by task
        self.pace, self.slowdown, self.ready = Pace(), Slowdown(), Ready(executor.shares)
        self.life = 0.0  # seconds from first step to end, smoothed
        self.written = 1.0  # tokens that are written, of those that may be, smoothed

    def __iter__(self) -> Iterator[Job]:
        yield from list(self.running)
        yield from list(self.queues)

    # -- arrival ---------------------------------------------------------------------------------------------------

    def check(self, job: Job, timeout: float | None) -> None:
        """Raise ClientLimit or Saturated where a request would not be served in time.

        A task may fill twice the room that is left in the queues (Choudhury and Hahne 1998, dynamic thresholds), so
        that one that floods them leaves room to others.
        """
        client, task = job.row.ask.client, job.task
        if client and self.clients.get(client, 0) >= self.limits.client:
            raise ClientLimit(
                f"{self.limits.client} requests of this client are under way, which is its limit; wait for one of them",
                max(0.1, self.life),
            )
        own, own_cost = self.queues.waiting(task)
        left = self.limits.waiting - len(self.queues)
        wait = self._wait(job, own_cost)
        unknown = timeout is not None and not self.pace.done  # then few may wait
        blind = unknown and len(self.queues) >= 2 * self.slots
        if own >= 2 * left or blind:
            raise Saturated(
                f"{len(self.queues)} requests wait already; try again in {max(0.1, wait):.1f} s",
                max(0.1, wait),
            )
        needed = _SAFE * (wait + self._takes(job))
        if timeout is not None and needed > timeout:
            raise Saturated(
                f"the answer would take about {needed:.1f} s, later than the {timeout:.1f} s that the request allows; "
                f"try again in {max(0.1, needed - timeout):.1f} s",
                max(0.1, needed - timeout),
            )

    def _takes(self, job: Job) -> float:
        """Seconds from a job's first step to its end, where it writes as much of what it may as jobs do on the mean."""
        parts = (job.size + self.ready.missing(job.row.ask)) // max(1, self.limits.chunk)
        return (1 + parts + (job.steps - 1) * self.written) * self.pace.step

    def _sure(self, job: Job) -> float:
        """Seconds that must be left to a job that begins."""
        return _SURE * self._takes(job)

    def _wait(self, job: Job, own: float) -> float:
        """Seconds until a job behind `own` work of its task begins.

        Every task that waits or runs is thought to go on asking, and to have its turn before each of ours: what waits
        now would be too little, for who comes later with an empty queue passes a long one.
        """
        if not self.queues and len(self.running) < self.slots:
            return 0.0
        others = len((self.tasks.keys() | self.queues.tasks) - {job.task})
        return self.pace.seconds(own + others * (own + self._work(job)) + self.reserved / 2)

    def _work(self, job: Job) -> int:
        """Positions that it takes at most, with those of a prompt that is not ready."""
        return job.cost + self.ready.missing(job.row.ask)

    def push(self, job: Job) -> None:
        """Queue a job that was checked."""
        client = job.row.ask.client
        if client:
            self.clients[client] = self.clients.get(client, 0) + 1
        self.queues.push(job.task, job, self._work(job))

    # -- each step -------------------------------------------------------------------------------------------------

    def due(self, now: float) -> list[tuple[Job, Reason]]:
        """Jobs that end before the next step: cancelled, out of time, or waiting for what would come too late.

        The last is what makes a promise of the deadline: who begins has the time that it takes.
        """
        found: list[tuple[Job, Reason]] = []
        for job in self:
            if job.ending is not None:
                found.append((job, job.ending))
            elif job.deadline is not None and now >= job.deadline:
                found.append((job, "deadline" if job in self.running else "overloaded"))
            elif (
                job.deadline is not None and job not in self.running and now + self._sure(job) > job.deadline
            ):
                found.append((job, "overloaded"))
        return found

    def next_deadline(self) -> float | None:
        """When the next job runs out of time."""
        return min((job.deadline for job in self if job.deadline is not None), default=None)

    def plan(self) -> Plan:
        """Everybody who writes gets one token; at most `chunk` positions of inputs and prompts are read besides."""
        plan, left = Plan(), self.limits.chunk
        for job in self.running:
            size, read = job.size, job.row.read
            if read >= size:
                plan.rows.append((job, 0))
            elif left > 0 or not plan:
                count = min(size - read, max(1, left)) if self.chunks else size - read
                plan.rows.append((job, count))
                left -= count
        while left > 0 and (new := self._admitted(left)) is not None:
            missing = self.ready.missing(new.row.ask)
            self.ready.use(new.row.ask)
            plan.prompts, left = plan.prompts + missing, left - missing
            count = min(new.size, max(1, left)) if self.chunks and new.writes else new.size
            if new.writes:
                plan.rows.append((new, count))
            else:
                plan.scores.append(new)
            left -= count
        return plan

    def _admitted(self, left: int) -> Job | None:
        """The next waiting job that has room, taken from its queue; one larger than a step waits for a whole step."""
        for task in self.queues.order():
            job = self.queues.first(task)
            if job.writes:
                if len(self.running) >= self.slots or self.reserved + job.cost > self.tokens:
                    return None  # it is this one's turn: those behind it do not pass
                if self._crowds(task):
                    continue
            least = 1 if job.writes and self.chunks else job.size
            if least + self.ready.missing(job.row.ask) > left < self.limits.chunk:
                return None
            self.queues.take(task)
            self.running[job] = None
            if job.writes:
                self.reserved += job.cost
                self.tasks[task] = self.tasks.get(task, 0) + 1
            return job
        return None

    def _crowds(self, task: str) -> bool:
        """Whether one more row of a task would harm others: it has some, and slots or the step are theirs."""
        own = self.tasks.get(task, 0)
        if own and len(self.running) >= self.slots - self.limits.spare:
            return True
        return own >= self.slowdown.most and self.slowdown.guests(task, self.tasks, self.queues.tasks)

    def drop(self, job: Job) -> bool:
        """Take a job out, wherever it is; True when it was running."""
        client = job.row.ask.client
        if client:
            self.clients[client] -= 1
            if not self.clients[client]:
                del self.clients[client]
        if job not in self.running:
            self.queues.remove(job.task, job)
            return False
        del self.running[job]
        if job.writes:
            self.reserved -= job.cost
            self.tasks[job.task] -= 1
            if not self.tasks[job.task]:
                del self.tasks[job.task]
                self.slowdown.left(job.task)
        return True

    def stepped(self, rows: int, done: float, seconds: float) -> None:
        """Count a step: its rows, the positions that it has done, and how long it took."""
        self.pace.add(done, seconds)
        if rows:
            self.slowdown.stepped(rows, seconds)

    def lived(self, job: Job, seconds: float) -> None:
        """Count how long a job took from its first step to its end, and how much of what it might it has written."""
        self.life = seconds if not self.life else self.life + 0.1 * (seconds - self.life)
        if job.writes:
            self.written += 0.1 * (len(job.row.new) / (job.steps - 1) - self.written)
