"""On another device than the CPU the same numbers come out, nothing is left here, and no row makes the host wait."""

import subprocess
import sys
from pathlib import Path

import pytest

ELSEWHERE = Path(__file__).with_name("elsewhere.py")


@pytest.mark.slow
@pytest.mark.parametrize("names", ["llama gemma2", "t5 bart", "bert modernbert"])
def test_there_as_here(names: str) -> None:
    """In a process of its own, for a device is registered for good."""
    done = subprocess.run([sys.executable, str(ELSEWHERE), *names.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == names.split()
