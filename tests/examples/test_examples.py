"""Every script of examples/ runs to its last line, on random backbones and for a few steps."""

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
LINES = {
    "tune.py": ("bert", "bytes of numbers in"),
    "own_data.py": ("bert", "The tap in the bath will not stop dripping -> "),
    "many_prompts.py": ("bert", "the mixed batch answers as each prompt alone: True"),
    "chat.py": ("llama", "answer: "),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == set(LINES)


@pytest.mark.parametrize("name", LINES)
def test_an_example(
    name: str, shelf: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone, says = LINES[name]
    monkeypatch.setattr(sys, "argv", [name, "--steps", "2", "--backbone", str(shelf / backbone)])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert says in capsys.readouterr().out
