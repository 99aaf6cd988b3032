"""Fair queues: of the tasks that wait, the one that has been given least goes first.

Start-time fair queueing, Goyal, Vin and Cheng 1996: v(task) grows by the cost of what it is given; a task that comes
back starts at the present V, so that it cannot save up.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, KeysView
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class FairQueues(Generic[Item]):
    """Items by task, first in first out within a task. cost: of all that wait."""

    def __init__(self) -> None:
        self._queues: dict[str, dict[Item, float]] = {}  # task -> item -> cost, in order of arrival
        self._given: dict[str, float] = {}
        self._now = 0.0
        self.cost = 0.0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        return (item for queue in self._queues.values() for item in queue)

    def push(self, task: str, item: Item, cost: float) -> None:
        """Put an item at the end of its task's queue."""
        if not self._count:  # nobody waits: what was given before is forgotten, with tasks that left
            self._given, self._now, self.cost = {}, 0.0, 0.0
        queue = self._queues.setdefault(task, {})
        if not queue:
            self._given[task] = max(self._given.get(task, 0.0), self._now)
        queue[item] = cost
        self.cost += cost
        self._count += 1

    def order(self) -> list[str]:
        """Tasks that wait, the next one first."""
        return sorted(self._queues, key=self._given.__getitem__)

    def first(self, task: str) -> Item:
        """The item of a waiting task that is next."""
        return next(iter(self._queues[task]))

    def take(self, task: str) -> Item:
        """Remove the next item of a task and count it as given."""
        item = self.first(task)
        cost = self.remove(task, item)
        self._now = max(self._now, self._given.get(task, 0.0))
        self._given[task] = self._given.get(task, self._now) + cost
        if len(self._given) > 2 * len(self._queues) + 64:
            self._given = {t: v for t, v in self._given.items() if t in self._queues or v > self._now}
        return item

    def remove(self, task: str, item: Item) -> float:
        """Remove an item that nobody will serve; returns its cost."""
        queue = self._queues[task]
        cost = queue.pop(item)
        if not queue:
            del self._queues[task]
        self.cost -= cost
        self._count -= 1
        return cost

    def waiting(self, task: str) -> tuple[int, float]:
        """How many items of a task wait, and what they cost."""
        queue = self._queues.get(task, {})
        return len(queue), sum(queue.values())

    @property
    def tasks(self) -> KeysView[str]:
        """Those that wait."""
        return self._queues.keys()
