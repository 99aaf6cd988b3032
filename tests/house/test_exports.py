"""Every public name resolves to the thing it names."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import incipit


@pytest.mark.parametrize("name", incipit.__all__)
def test_a_public_name_resolves(name: str) -> None:
    value = getattr(incipit, name)
    assert not inspect.ismodule(value), f"incipit.{name} is a module: export what it holds"
    if name != "__version__":
        assert value is getattr(importlib.import_module(incipit._HOME[name]), name)


def test_names_are_sorted_and_listed_once() -> None:
    names = list(incipit._HOME)
    assert names == sorted(set(names))
    assert set(dir(incipit)) == set(incipit.__all__)


def test_a_wrong_name_says_so() -> None:
    with pytest.raises(AttributeError, match="module 'incipit' has no attribute 'prompt'"):
        _ = incipit.prompt


def test_a_star_import_gives_exactly_the_public_names(root: Path) -> None:
    program = "from incipit import *; import incipit; print(sorted(set(incipit.__all__) - set(globals())))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root / "src")
    assert done.stdout.strip() == "[]", done.stderr
