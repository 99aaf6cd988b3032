"""A cell that starts from the prompt of another one: run after it, seed by seed, carried over where it must be."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from incipit import artifact, files, record
from incipit.errors import RecipeError
from incipit.study import Study, cells, grid
from incipit.transfer import rows_of

SILENT: Any = lambda line: None  # noqa: E731
BEGUN = """
[experiments.begun]
task = ["toy"]
backbone = ["one"]
method = ["prompt"]
[experiments.begun.axes.start]
warm = { source = { start = "own" }, "train.lr" = 1e-9 }
other = { do = "start", source = { backbone = "two", start = "own" } }
bare = { do = "start", source = { start = "own" } }
random = { do = "start", "prompt.start" = "normal" }
own = {}
"""


@pytest.fixture
def begun(study: Path) -> Path:
    path = study / "studies" / "toy" / "small.toml"
    files.atomic_write(path, files.read_bytes(path).decode() + BEGUN)
    return path


def test_a_prompt_starts_from_that_of_another_cell(begun: Path) -> None:
    plan = Study.read("toy")
    done = grid.run(plan, "runs", only=["begun"], say=SILENT)
    names = [
        f"begun/toy/one/prompt/{label}" for label in ("own", "warm", "own@two", "other", "bare", "random")
    ]
    assert sorted(done.ran) == sorted(names) and done.ran.index(names[0]) < done.ran.index(names[1])
    found = {
        (row["name"].rpartition("/")[2], row["seed"]): row for row in record.read(Path("runs") / grid.RECORDS)
    }
    for seed in (0, 1):
        own, bare, warm = (found[label, seed] for label in ("own", "bare", "warm"))
        assert bare["scores"]["test"]["accuracy"] == own["scores"]["test"]["accuracy"]
        assert "validation" not in bare["scores"] and bare["parameters"] == 0
        assert bare["extra"]["norm"] == pytest.approx(own["extra"]["norm"])
        assert warm["extra"]["norm"] == pytest.approx(
            own["extra"]["norm"], rel=1e-4
        )  # its steps are as good as none
        assert all(
            not row["settings"]["prompt"]["source"] for row in (bare, warm)
        )  # no place of this machine
    assert found["other", 0]["extra"]["norm"] != pytest.approx(found["bare", 0]["extra"]["norm"], rel=1e-6)
    again = grid.run(plan, "runs", only=["begun"], say=SILENT)
    assert not again.ran and len(again.known) == 6


def test_what_it_starts_from_is_a_part_of_what_it_is(begun: Path) -> None:
    keys = {p.coordinates["start"]: p.cell for p in Study.read("toy").places(["begun"])}
    assert len({cell.key for cell in keys.values()}) == 5
    assert keys["warm"].source is not None and keys["warm"].source.key == keys["own"].key
    before = keys["warm"].key
    changed = Study.read("toy", overrides=["prompt.length=3"]).places(["begun"])
    assert changed[0].cell.key != before and changed[0].cell.source.key != keys["own"].key  # type: ignore[union-attr]


def test_a_prompt_carried_over_has_the_width_of_its_new_backbone(begun: Path) -> None:
    plan = Study.read("toy")
    grid.run(plan, "runs", only=["begun"], say=SILENT)
    bench = grid._Bench(plan, Path("runs"), "", "", SILENT)
    (own,) = (p.cell for p in plan.places(["begun"]) if p.coordinates["start"] == "own")
    place = cells.prompts(bench._folder(own))[1]
    backbone = bench.fresh(own)
    moved = artifact.load(cells.carried(place, backbone, backbone, Path("moved")))
    given, found = rows_of(artifact.load(place)), rows_of(moved)
    assert found.shape == given.shape and found == pytest.approx(given, abs=1e-3)  # to itself: the same rows


def test_scores_whose_prompts_are_gone_are_told(begun: Path) -> None:
    files.atomic_write(begun, files.read_bytes(begun).decode().replace("warm = {", "cold = {"))
    grid.run(Study.read("toy"), "runs", only=["begun"], say=SILENT)
    shutil.rmtree(Path("runs") / "cells")
    files.atomic_write(begun, files.read_bytes(begun).decode().replace("1e-9", "1e-8"))
    with pytest.raises(
        RecipeError, match=r"toy/one/prompt/own, from which .*cold starts, are not in 'runs' for the"
    ):
        grid.run(Study.read("toy"), "runs", only=["begun"], say=SILENT)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ('{ source = { start = "own" }, "tr', '{ source = "own", "tr', "source = 'own' is no table of labels"),
        ('{ start = "own" }, "tr', '{ start = "owm" }, "tr', "there is no start = 'owm' here; did you mean 'own'"),
        ('{ start = "own" }, "tr', '{ strat = "own" }, "tr', "there is no strat = 'own' here; did you mean 'start'"),
        ('{ start = "own" }, "tr', '{ start = "bare" }, "tr', "starts from a prompt itself; name another"),
        ('{ start = "own" }, "tr', '{ task = "toy" }, "tr', "starts from a prompt itself; name another"),
        ('backbone = "two"', 'backbone = "tow"', "there is no backbone = 'tow' here; did you mean 'two'"),
    ],
)  # fmt: skip
def test_a_source_that_is_none(begun: Path, before: str, after: str, says: str) -> None:
    text = files.read_bytes(begun).decode()
    assert before in text
    files.atomic_write(begun, text.replace(before, after))
    with pytest.raises(RecipeError) as refused:
        Study.read("toy").places(["begun"])
    assert says in str(refused.value)
