"""Which prompts the model has ready, told from outside: an executor may be in another process, and says how many."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from incipit.serve.asks import Ask


class Ready:
    """Versions in the order of their last use; the executor drops the longest unused first, as this does.

    An estimate: the size of steps depends on it and what is promised, never what is answered.
    """

    def __init__(self, shares: bool) -> None:
        self.shares = shares  # whether a prompt is read once, before the first of its rows
        self._used: OrderedDict[str, None] = OrderedDict()

    def missing(self, ask: Ask) -> int:
        """Positions of its prompts that must be read before it."""
        if not self.shares:
            return 0
        return sum(version.length for version in _versions(ask) if version.id not in self._used)

    def use(self, ask: Ask) -> None:
        """Its prompts are read, or were."""
        for version in _versions(ask):
            self._used[version.id] = None
            self._used.move_to_end(version.id)

    def keep(self, count: int) -> None:
        """The executor keeps so many."""
        while len(self._used) > count:
            self._used.popitem(last=False)


def _versions(ask: Ask) -> Iterator[Any]:
    if ask.version is not None:
        panel = ask.version.panel
        yield from (ask.version,) if panel is None else panel.members
