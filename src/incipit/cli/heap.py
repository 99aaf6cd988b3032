"""Memory that a pass has freed stays with the process, for the next pass to take without asking for pages again."""

from __future__ import annotations

import ctypes
import sys

# glibc 2.36, malloc.h; the values are C ints
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
NEVER, WIDEST = -1, 32 * 2**20  # WIDEST: bytes, the most that glibc takes


def keep() -> bool:
    """Ask the C library to give no memory back before the process ends; False where it is not glibc.

    It hands freed tensors back to the system and fetches them again page by page, every page filled with zeros first:
    of small steps on a CPU that is a good part of the time. What the process holds at its peak is about the same.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(MMAP_THRESHOLD, WIDEST) and mallopt(TRIM_THRESHOLD, NEVER))
