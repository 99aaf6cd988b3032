"""The grid runs every cell once, wherever it is killed, and never mixes records of other settings or data."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from incipit import files, record
from incipit.errors import BackboneError, DataError, Interrupted, RecipeError
from incipit.study import Study, grid
from incipit.study.points import Points
from incipit.train import loop

SILENT: Any = lambda line: None  # noqa: E731


def rows(folder: Path) -> list[dict[str, Any]]:
    return record.read(folder / grid.RECORDS)


def edit(path: Path, before: str, after: str) -> None:
    text = files.read_bytes(path).decode()
    assert before in text
    files.atomic_write(path, text.replace(before, after))


def test_cells_are_known_by_their_settings(study: Path) -> None:
    plan = Study.read("toy")
    places = plan.places()
    assert [len(plan.places([name])) for name in ("size", "length", "vote")] == [6, 2, 1]
    assert places[0].coordinates == {"task": "toy", "method": "prompt", "size": "one"}
    keys = [p.cell.key for p in places]
    assert len(set(keys)) == 9  # the prompt of 4 rows in `length` has no shift, so it is another cell
    assert (
        Study.read("studies/toy", data="elsewhere").places()[0].cell.key == keys[0]
    )  # a place is no setting
    changed = Study.read("toy", overrides=["train.steps=3"]).places()
    assert changed[0].cell.key != keys[0]
    assert {p.cell.do for p in places} == {"tune", "few-shot", "ensemble"}


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("[experiments.vote]", "[experiment.vote]", "experiment: unknown key; did you mean 'experiments'"),
        (
            'method = ["ensemble"]',
            'method = ["ensembel"]',
            "'ensembel' is not in [methods]; did you mean 'ensemble'",
        ),
        ('shift = ["far"]', 'shift = ["near"]', "experiments.size.shift: 'near' is not in [tasks]"),
        ('backbone = "{size}"', 'backbone = "x-{size}"', "'x-one' is not in [backbones]"),
        ('do = "ensemble"', 'do = "ensembel"', "do = 'ensembel' is unknown; did you mean 'ensemble'"),
        ("parameters = 1000", "sise = 1000", "backbones.one.sise: unknown key"),
        ('"prompt.length" = 2', '"prompt.lenght" = 2', "prompt.lenght"),
        ('one = { name = "t5", parameters = 1000 }', 'one = "t5"', "backbones.one: 't5' is no table; write"),
        ('[experiments.vote]\ntask = ["toy"]\n', "[experiments.vote]\n", "vote.task: missing; name some of [tasks]"),
        ('vote]\ntask = ["toy"]', 'vote]\ntask = "toy"', "experiments.vote.task: 'toy' is no list; write names"),
        ("prompt = {}\n", "", "experiments.length.method: missing; name some of [methods] in a list"),
        ("axes.size = { one = {}, two = {} }", "axes.size = [1, 2]", "axes.size: [1, 2]; write a table of changes"),
        ('backbone = "{size}"', 'backbone = "{sise}"', "'{sise}' is no template over task, method, size"),
        ('train = "{data}/toy:train"', "train = 5", "task.train: 5 is no text"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_be_read(study: Path, before: str, after: str, says: str) -> None:
    edit(study / "studies" / "toy" / "small.toml", before, after)
    with pytest.raises(RecipeError) as refused:
        Study.read("toy").places()
    assert says in str(refused.value)


def test_a_study_a_scale_or_an_experiment_that_is_not_there(study: Path) -> None:
    with pytest.raises(RecipeError, match="there is no study 'toyy'; did you mean 'toy'"):
        Study.read("toyy")
    with pytest.raises(RecipeError, match="has no scale 'smal'; did you mean 'small'"):
        Study.read("toy", "smal")
    with pytest.raises(RecipeError, match="no experiment 'lenght'; did you mean 'length'"):
        Study.read("toy").places(["lenght"])


def test_every_cell_once(study: Path) -> None:
    said: list[str] = []
    done = grid.run(Study.read("toy"), "runs", say=said.append)
    assert len(done.ran) == 9 and not done.known
    assert said[0].startswith("[1/9] size/toy/prompt/one ...") and "left" in said[2]
    found = rows(Path("runs"))
    assert len(found) == 6 * 2 + 2 * 2 + 3  # two seeds each, and the vote
    first = found[0]
    assert set(first["scores"]) == {"validation", "test", "shift:far"} and set(first["data"]) == {
        "task",
        "shift:far",
    }
    assert (
        first["extra"]["frozen"] is True
        and first["extra"]["bytes"] > 0
        and len(first["extra"]["neighbours"]) == 4
    )
    assert not {"data", "train", "test"} & set(first["settings"]["task"])  # no place of this machine
    (vote,) = (row for row in found if row["seed"] == -1)
    assert vote["extra"]["equal"] == 1.0 and vote["extra"]["members"] == 2
    again = grid.run(Study.read("toy"), "runs", say=SILENT)
    assert not again.ran and len(again.known) == 9 and len(rows(Path("runs"))) == len(found)


def test_a_matched_model_meets_the_prompts_score_on_validation(study: Path) -> None:
    edit(
        study / "studies" / "toy" / "small.toml",
        'method = ["prompt", "model", "few-shot"]',
        'method = ["matched"]',
    )
    edit(study / "studies" / "toy" / "small.toml", "two = {} }", "two = {} }\n[experiments.unmatched]\n"
         'task = ["toy"]\nbackbone = ["one"]\nmethod = ["model"]\nshift = ["far"]')  # fmt: skip
    plan = Study.read("toy")
    assert len({p.cell.key for p in plan.places(["size", "unmatched"])}) == 3
    done = grid.run(plan, "runs", only=["size"], say=SILENT)
    assert done.ran == [f"size/toy/{m}/{s}" for s in ("one", "two") for m in ("prompt", "matched")]
    found = {(r["name"], r["seed"]): r for r in rows(Path("runs"))}
    for seed in (0, 1):
        prompt, matched = (found[f"size/toy/{m}/one", seed] for m in ("prompt", "matched"))
        assert matched["extra"]["match"] == prompt["scores"]["validation"]["accuracy"]
        assert set(matched["scores"]) == {"validation", "test", "shift:far"}
    assert len(grid.run(plan, "runs", only=["size"], say=SILENT).known) == 4


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ('match = "prompt"', 'match = "promt"', "match = 'promt' is no other of [methods]; did you mean 'prompt'"),
        ('match = "prompt"', 'match = "matched"', "match = 'matched' is no other of [methods]"),
        ('match = "prompt"', 'match = "few-shot"', "toy/few-shot/one has no score on validation for the seeds [0, 1]"),
    ],
)  # fmt: skip
def test_what_cannot_be_matched(study: Path, before: str, after: str, says: str) -> None:
    path = study / "studies" / "toy" / "small.toml"
    edit(path, 'method = ["prompt", "model", "few-shot"]', 'method = ["matched"]')
    edit(path, before, after)
    with pytest.raises(RecipeError) as refused:
        grid.run(Study.read("toy"), "runs", only=["size"], say=SILENT)
    assert says in str(refused.value)


BOTH = """
[tasks.other]
kind = "classification"
input = "say {text}"
labels = { 0 = "wrong", 1 = "right" }
train = "{data}/toy:train"
test = "{data}/toy:test"
split = { validation = 0.2 }
metrics = ["accuracy"]
set = { "prompt.length" = 3 }
[methods.multi-task]
mixture = { limit = 8 }
"train.method" = "model"
"prompt.kind" = "none"
"train.lr" = 0.001
[experiments.both]
task = ["toy", "other"]
backbone = ["one"]
method = ["multi-task", "model"]
[experiments.vote]"""


def test_a_mixture_is_one_cell_and_every_task_reads_its_own_score(study: Path) -> None:
    edit(study / "studies" / "toy" / "small.toml", "[experiments.vote]", BOTH)
    plan = Study.read("toy")
    toy, _, other, _ = (p.cell for p in plan.places(["both"]))
    assert toy.key == other.key and toy.name == other.name == "both/toy+other/one/multi-task"
    done = grid.run(plan, "runs", only=["both"], say=SILENT)
    assert len(done.ran) == 3
    found = rows(Path("runs"))
    mixed = next(r for r in found if r["name"] == toy.name)
    alone = {r["name"].split("/")[1]: r["data"]["task"] for r in found if r["name"] != toy.name}
    assert mixed["data"] == {f"task:{name}": digest for name, digest in alone.items()}
    assert not {"data", "train", "test"} & set(mixed["settings"]["mixture"]["tasks"]["other"])
    points = {tuple(p.place.coordinates.values()): p for p in Points.of(plan, found).of_experiment("both")}
    for task in ("toy", "other"):
        point, scores = (
            points[task, "one", "multi-task"],
            [r["scores"]["test"] for r in found if r["name"] == toy.name],
        )
        assert point.numbers("test") == [one[f"{task}.accuracy"] for one in scores]
        assert point.numbers("test.legal_rate") == [one[f"{task}.legal_rate"] for one in scores]
    assert len(grid.run(plan, "runs", only=["both"], say=SILENT).known) == 3
    edit(study / "studies" / "toy" / "small.toml", "limit = 8", "limit = 9")
    assert Study.read("toy").places(["both"])[0].cell.key != toy.key


def test_limits_and_seeds_that_come_later(study: Path) -> None:
    one = grid.run(Study.read("toy"), "runs", only=["length"], say=SILENT, limit=1)
    assert len(one.ran) == 1
    edit(study / "studies" / "toy" / "small.toml", "seeds = [0, 1]", "seeds = [0, 1, 2]")
    grid.run(Study.read("toy"), "runs", only=["length"], say=SILENT)
    found = rows(Path("runs"))
    assert sorted(row["seed"] for row in found) == [0, 0, 1, 1, 2, 2]  # the first cell: its third seed alone


def test_other_settings_and_other_data_make_other_records(study: Path) -> None:
    grid.run(Study.read("toy"), "runs", only=["length"], say=SILENT)
    known = rows(Path("runs"))
    edit(study / "studies" / "toy" / "small.toml", "lr = 0.1", "lr = 0.2")
    assert len(grid.run(Study.read("toy"), "runs", only=["length"], say=SILENT).ran) == 2
    files.append_jsonl(study / "data" / "toy" / "train.jsonl", {"text": "one more", "label": 1})
    assert len(grid.run(Study.read("toy"), "runs", only=["length"], say=SILENT).ran) == 2
    found = rows(Path("runs"))
    assert found[: len(known)] == known and len(found) == 3 * len(known)
    assert len({(row["settings"]["cell"], row["data"]["task"]) for row in found}) == 6


def test_a_stand_in_is_not_taken_for_the_backbone(study: Path) -> None:
    from incipit.backbones import tiny

    tiny.save("llama", study / "llama")
    grid.run(Study.read("toy"), "runs", only=["length"], say=SILENT, stand_in="llama")
    assert len(grid.run(Study.read("toy"), "runs", only=["length"], say=SILENT).ran) == 2


def test_missing_data_is_told_before_anything_starts(study: Path) -> None:
    said: list[str] = []
    with pytest.raises(DataError) as refused:
        grid.run(Study.read("toy", data="nowhere"), "runs", say=said.append)
    told = str(refused.value)
    assert "nothing was started: 1 problem(s)" in told and "--data" in told
    assert "'nowhere/toy:train' does not exist" in told and "(for size, length, vote)" in told
    assert not said and not files.exists(study / "runs")


def test_a_renamed_field_is_told_with_its_line(study: Path) -> None:
    edit(study / "data" / "toy" / "train.jsonl", '"label"', '"lable"')
    with pytest.raises(
        DataError, match=r"train.jsonl:1: no field 'label'; did you mean 'lable'(.|\n)*for length"
    ):
        grid.run(Study.read("toy"), "runs", only=["length"], say=SILENT)


def test_a_wrong_backbone(study: Path) -> None:
    from incipit.backbones import tiny

    tiny.save("bert", study / "bert")
    with pytest.raises(BackboneError, match="nowhere"):
        grid.run(Study.read("toy"), "runs", only=["length"], say=SILENT, stand_in="nowhere")
    edit(study / "studies" / "toy" / "small.toml", 'two = { name = "t5"', 'two = { name = "bert"')
    with pytest.raises(
        BackboneError, match="encoder-decoder"
    ):  # a sentinel before targets, which it has none of
        grid.run(Study.read("toy"), "runs", only=["size"], say=SILENT)


def test_ctrl_c_names_the_cell_and_the_same_line_goes_on(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(study / "studies" / "toy" / "small.toml", "steps = 2", "steps = 4")
    accumulate, steps = loop.accumulate, []

    def third(*given: Any, **named: Any) -> Any:
        steps.append(1)
        if len(steps) == 5:  # the first step of the second cell; it is noticed at the next
            os.kill(os.getpid(), signal.SIGINT)
        return accumulate(*given, **named)

    monkeypatch.setattr(loop, "accumulate", third)
    with pytest.raises(
        Interrupted,
        match=r"in length/toy/one/prompt/4; its state and 1 of 2 cells .* 'runs': the same line goes on",
    ):
        grid.run(Study.read("toy"), "runs", only=["length"], say=SILENT)
    done = grid.run(Study.read("toy"), "runs", only=["length"], say=SILENT)
    assert (len(done.known), len(done.ran), len(steps)) == (1, 1, 8)  # no step was made twice


KILLED = """
import os, signal
from pathlib import Path
from incipit import record
from incipit.study import Study, grid
append, count = record.append, 0
def once(path, one):
    global count
    count += Path(path).name == "{file}"
    if count == {last} and Path(path).name == "{file}":
        os.kill(os.getpid(), signal.SIGKILL)
    return append(path, one)
record.append = once
grid.run(Study.read("toy"), "runs", only=["length"])
"""


@pytest.mark.parametrize(
    ("file", "last", "left"),
    [
        ("record.jsonl", 1, 0),  # trained, and nothing on record yet
        ("records.jsonl", 2, 1),  # within a cell's rows
    ],
)
def test_killed_and_gone_on_is_what_an_undisturbed_run_is(
    study: Path, file: str, last: int, left: int
) -> None:
    program = KILLED.format(file=file, last=last)
    killed = subprocess.run([sys.executable, "-c", program], cwd=study, env=dict(os.environ), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (len(rows(study / "runs")) if files.exists(study / "runs" / grid.RECORDS) else 0) == left
    grid.run(Study.read("toy"), "runs", only=["length"], say=SILENT)
    grid.run(Study.read("toy"), "undisturbed", only=["length"], say=SILENT)
    one, other = (
        {(r["settings"]["cell"], r["seed"]): r["scores"] for r in rows(Path(f))}
        for f in ("runs", "undisturbed")
    )
    assert one == other and len(one) == 4 and len(rows(Path("runs"))) == 4
