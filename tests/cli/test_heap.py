"""Freed memory that stays: the second pass asks the system for no pages; no other platform is touched."""

import subprocess
import sys
import textwrap

import pytest

from incipit.cli import heap


@pytest.mark.skipif(not hasattr(heap.ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_the_next_pass_takes_what_the_last_one_freed() -> None:
    """A process fills 8 x 8 MiB anew that it has just freed: 16,384 pages without `keep`, each time."""
    program = textwrap.dedent("""
        import resource
        import torch
        from incipit.cli import heap
        assert heap.keep()
        def passed():
            start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            kept = [torch.ones(2 * 2**20) for _ in range(8)]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
        passed(), passed()
        print(min(passed() for _ in range(4)))  # other memory may come to lie between once
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000


def test_elsewhere_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert not heap.keep()
    monkeypatch.setattr(heap.sys, "platform", "linux")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())  # musl has no mallopt
    assert not heap.keep()
