"""The demo in small: two steps each, on the built-in backbones."""

import sys
from pathlib import Path

import pytest

from incipit import artifact, demo, files
from incipit.backbones import tiny
from incipit.errors import StorageError


@pytest.mark.real
@pytest.mark.slow
def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STEPS", {"encoder": 4, "generative": 4, "model": 4})
    said: list[str] = []
    report = demo.run(tmp_path / "demo", say=said.append)
    table = report.table()
    assert set(table) == {"backbone", "seconds", "seeds", "tasks", "mixed_batch_equal"}
    assert set(table["tasks"]) == {"items", "news", "questions", "reviews", "tickets"}
    assert table["mixed_batch_equal"] is True
    for name, row in table["tasks"].items():
        assert 0 <= row["zero_shot"] <= 1 and 0 <= row["few_shot"] <= 1 and 0 <= row["prompt_tuning"] <= 1
        assert row["prompt_bytes"] < 64_000 < row["model_bytes"]
        assert ("majority" in row) == (name != "items") and ("model_tuning" in row) == (name == "questions")
    assert table["tasks"]["questions"]["majority"] == pytest.approx(1 / 6)
    assert [artifact.load(place).name for place in report.places] == [
        "items",
        "news",
        "questions",
        "reviews",
        "tickets",
    ]
    assert {task for task, _, _ in report.mixed} == set(table["tasks"])
    assert files.read_bytes(report.figure).startswith(b"\x89PNG")
    assert any("builtin:minilm" in line for line in said)


@pytest.mark.real
def test_an_encoder_leaves_free_text_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "builtin_names", lambda: ("items",))
    said: list[str] = []
    report = demo.run(tmp_path / "demo", backbone="builtin:minilm", say=said.append)
    assert report.rows == [] and any("items: left out" in line for line in said)


def test_a_second_demo_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "demo" / "builtin-lm").mkdir(parents=True)
    with pytest.raises(StorageError, match="exists already: pass --overwrite, or choose another --folder"):
        demo.run(tmp_path / "demo", say=print)


def test_without_matplotlib_all_is_there_but_the_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny.save("bert", tmp_path / "bert")
    monkeypatch.setattr(demo, "builtin_names", lambda: ("reviews",))
    monkeypatch.setattr(demo, "STEPS", {"encoder": 4, "generative": 4, "model": 4})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said: list[str] = []
    report = demo.run(tmp_path / "demo", backbone=str(tmp_path / "bert"), say=said.append)
    assert [row.task for row in report.rows] == ["reviews"] and report.figure == ""
    assert said[-1] == "no figure without matplotlib: pip install matplotlib"
