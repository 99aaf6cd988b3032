"""What is told and recorded."""

import io
from pathlib import Path

import pytest
import rich.console
from rich.console import Console

from incipit import files
from incipit.errors import TrainingError
from incipit.train.progress import Progress


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What goes to the error stream, as a log would hold it."""
    out = io.StringIO()
    monkeypatch.setattr(
        rich.console, "Console", lambda **options: Console(**(options | {"stderr": False, "file": out}))
    )
    return out


def test_a_log_gets_plain_lines(screen: io.StringIO, tmp_path: Path) -> None:
    with Progress(tmp_path, steps=10, start=2) as shown:
        shown.step(3, 60, None, {"a": 0.1})
        shown.step(4, 60, {"a": 1.25}, {"a": 0.1})
        shown.evaluated(4, "a", {"accuracy": 0.5, "f1": 0.25}, better=True)
        shown.step(5, 60, {"a": 1.0}, {"a": 0.1})
    lines = screen.getvalue().splitlines()
    assert lines[0].startswith("step 4/10  a loss 1.2500  ") and "tokens/s  left 0:0" in lines[0]
    assert lines[1] == "step 4  a  dev accuracy 0.5000  (best so far)"
    assert lines[2].startswith("step 5/10  a loss 1.0000 dev 0.5000  ")


def test_many_trainees_are_shown_as_their_mean(screen: io.StringIO, tmp_path: Path) -> None:
    names = [f"p{k}" for k in range(5)]
    with Progress(tmp_path, steps=10) as shown:
        shown.step(1, 60, dict.fromkeys(names, 2.0), dict.fromkeys(names, 0.1))
    assert "5 trainees, mean loss 2.0000" in screen.getvalue()
    assert len(files.read_jsonl(tmp_path / "metrics.jsonl")) == 5


def test_records(tmp_path: Path) -> None:
    with Progress(tmp_path, steps=10, seconds=100.0, show=False) as shown:
        shown.step(4, 60, {"a": 1.25}, {"a": 0.1})
        shown.evaluated(4, "a", {"accuracy": 0.5}, better=False)
    step, dev = files.read_jsonl(tmp_path / "metrics.jsonl")
    assert step.pop("seconds") >= 100 and dev.pop("seconds") >= 100
    assert step == {"step": 4, "trainee": "a", "loss": 1.25, "lr": 0.1, "tokens": 60}
    assert dev == {"step": 4, "trainee": "a", "scores": {"accuracy": 0.5}, "best": False}


def test_other_processes_are_silent(screen: io.StringIO, tmp_path: Path) -> None:
    with Progress(tmp_path, steps=10, main=False) as shown:
        shown.step(4, 60, {"a": 1.25}, {"a": 0.1})
    assert screen.getvalue() == "" and not list(tmp_path.iterdir())


def test_a_terminal_gets_a_live_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = io.StringIO()
    live = {"stderr": False, "file": out, "force_terminal": True, "width": 100}
    monkeypatch.setattr(rich.console, "Console", lambda **options: Console(**(options | live)))
    with Progress(tmp_path, steps=10) as shown:
        shown.step(4, 60, {"a": 1.25}, {"a": 0.1})
        shown.step(5, 60, None, {"a": 0.1})
    assert "5/10" in out.getvalue() and "a loss 1.2500" in out.getvalue()


def test_tensorboard_is_asked_for_by_name_when_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match="TensorBoard is not installed: `pip install tensorboard`"):
        Progress(tmp_path, steps=1, tensorboard=True)
