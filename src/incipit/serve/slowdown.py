"""How much one task may slow down the others: what a step costs by its rows, measured, and who is there beside it."""

from __future__ import annotations

from collections.abc import Container, Mapping

_SLOWER = 1.6  # times as long as alone that a step takes at most, where a task shares it with others that ask little
_SOME = 3.0  # rows beside the first, on the mean, from which on their cost is believed
_KEEP = 0.98  # of what was measured, by the next step
_LINGER = 64  # steps after its last row for which a task still counts as there


class Slowdown:
    """A model whose steps take longer the more rows they have: a task with many makes those of the others slow.

    Where a step costs the same whatever its rows, as on a device that is never full, nobody has to give way.
    """

    def __init__(self) -> None:
        self.alone = 0.0  # seconds of a step of one row
        self._steps = self._rows = self._seconds = 0.0
        self._turn = 0
        self._left: dict[str, int] = {}  # task -> the turn when its last row ended

    def stepped(self, rows: int, seconds: float) -> None:
        """Count a step."""
        self._turn += 1
        if rows == 1:
            self.alone = self.alone + 0.1 * (seconds - self.alone) if self.alone else seconds
        self._steps = self._steps * _KEEP + 1
        self._rows = self._rows * _KEEP + rows
        self._seconds = self._seconds * _KEEP + seconds

    def left(self, task: str) -> None:
        """The last row of a task has ended."""
        self._left[task] = self._turn
        if len(self._left) > 256:
            self._left = {t: at for t, at in self._left.items() if self._turn - at < _LINGER}

    @property
    def most(self) -> float:
        """Rows that a task runs at most beside others that ask little; inf where rows cost nothing, or it is not known.

        T(n) = T(1) + (n - 1) c, with c from the mean of the last steps; the n where T(n) = _SLOWER T(1).
        """
        more = self._rows - self._steps  # both of the last steps
        slower = self._seconds - self._steps * self.alone
        if not self.alone or more < _SOME * self._steps or slower <= 0:
            return float("inf")
        return max(1.0, 1 + (_SLOWER - 1) * self.alone * more / slower)

    def guests(self, task: str, running: Mapping[str, int], waiting: Container[str]) -> bool:
        """Whether tasks that ask little are there: they have few rows and none that waits."""
        most = self.most
        if any(t != task and n < most and t not in waiting for t, n in running.items()):
            return True
        return any(
            t != task and t not in waiting and self._turn - at < _LINGER for t, at in self._left.items()
        )
