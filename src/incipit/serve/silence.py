"""How long a process has said nothing, though it could have: what tells one that hangs from one that is not let run."""

from __future__ import annotations

import os
import time

from incipit import files
from incipit.errors import IncipitError


class Silence:
    """Time in looks, each of which counts `most` seconds at most: a machine that was halted does not hang."""

    def __init__(self, most: float) -> None:
        self.most = most
        self._before, self._spent = time.monotonic(), 0.0

    def look(self, process: int) -> float:
        """Seconds to count since the last look. Of a process that waits for a processor only what it got counts.

        process: its id; 0 for this one, which counts as it is.
        """
        now = time.monotonic()
        passed, self._before = min(now - self._before, self.most), now
        waits, total = _pressed(process) if process else (False, 0.0)
        spent, self._spent = self._spent, total
        if not waits:
            return passed
        return min(passed, max(0.0, total - spent)) if spent else 0.0

    def broken(self) -> None:
        """It has said something."""
        self._spent = 0.0


def _pressed(process: int) -> tuple[bool, float]:
    """(whether a thread of a process could run, seconds of processor that all have had), as far as /proc tells."""
    try:
        stats = [_stat(f"/proc/{process}/task/{task}/stat") for task in os.listdir(f"/proc/{process}/task")]
        whole = _stat(f"/proc/{process}/stat")
    except (OSError, IncipitError):  # no /proc here, or a thread that has just ended
        return False, 0.0
    ticks = int(whole[11]) + int(whole[12])  # user and system, proc(5)
    return any(stat[0] == b"R" for stat in stats), ticks / os.sysconf("SC_CLK_TCK")


def _stat(place: str) -> list[bytes]:
    """Fields from the third on, the state."""
    return files.content(place).rsplit(b")", 1)[1].split()
