"""One model, several tasks: rows come by their shares, every task is scored by itself, and the mean chooses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from incipit import files
from incipit.backbones import tiny
from incipit.batch import Encoded
from incipit.errors import DataError, RecipeError
from incipit.recipe import Recipe
from incipit.run import tune
from incipit.run.mixture import joined, named, shares
from incipit.tasks.example import Example
from incipit.train import ExampleStream
from incipit.transfer.multitask import Mixed, Row

WORDS = {"mood": ("bad", "good"), "place": ("home", "away", "sea")}


def test_shares_by_hand() -> None:
    assert shares([300, 100]) == [0.75, 0.25]
    assert shares([300, 100], limit=100) == [0.5, 0.5]
    assert shares([300, 100], limit=200) == [2 / 3, 1 / 3]
    assert shares([300, 100, 1], "equal") == [1 / 3] * 3


def streams() -> list[ExampleStream[int]]:
    return [ExampleStream(range(10 * k, 10 * k + 5), lambda i: Encoded([i], [], []), seed=3) for k in (0, 1)]


def test_rows_are_drawn_by_their_shares_and_a_restored_mixture_goes_on() -> None:
    mixed: Any = Mixed(streams(), [0.75, 0.25], seed=1)  # type: ignore[arg-type]
    rows = mixed.next(2000)
    own = [row.task for row in rows]
    assert 440 < sum(own) < 560  # 500 ± 19, fixed by the seed
    assert all(row.input_ids[0] // 10 == row.task for row in rows)
    assert [r.task for r in Mixed(streams(), [0.75, 0.25], seed=2).next(2000)] != own  # type: ignore[arg-type]
    state = mixed.state()
    after = mixed.next(200)
    again: Any = Mixed(streams(), [0.75, 0.25], seed=1)  # type: ignore[arg-type]
    again.restore(state)
    assert [vars(r) for r in again.next(200)] == [vars(r) for r in after]
    in_turn: Any = Mixed(streams())  # type: ignore[arg-type]
    assert [isinstance(r, Row) and r.task for r in in_turn.next(4)] == [0, 1, 0, 1]


def test_scores_of_tasks_as_one_table() -> None:
    told = joined({"a": {"accuracy": 0.5, "legal_rate": 1.0}, "b": {"f1_macro": 0.7}})
    assert told == {"mean": 0.6, "a.accuracy": 0.5, "a.legal_rate": 1.0, "b.f1_macro": 0.7}
    assert next(iter(told)) == "mean"
    assert joined({"a": {"perplexity": 8.0}, "b": {"accuracy": 1.0}})["mean"] == -3.5


def test_the_name_stands_before_the_input() -> None:
    (one,) = named([Example(input="text: Rain.", target="sea")], "place")
    assert (one.input, one.target) == ("place text: Rain.", "sea")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, words in WORDS.items():
        for split, count in (("train", 24), ("test", 6)):
            for i in range(count):
                files.append_jsonl(
                    tmp_path / name / f"{split}.jsonl",
                    {"text": f"{i} it was {words[i % len(words)]}", "label": i % len(words)},
                )
    return tmp_path


def task(data: Path, name: str) -> dict[str, Any]:
    return {
        "kind": "classification", "input": "{text}", "labels": list(WORDS[name]), "metrics": ["accuracy"],
        "train": f"{data / name}:train", "test": f"{data / name}:test", "split": {"validation": 0.25},
    }  # fmt: skip


def mixed(data: Path, family: str, *overrides: str) -> Recipe:
    if not files.exists(data / family):
        tiny.save(family, data / family)
    table = {
        "name": "both",
        "backbone": {"name": str(data / family), "device": "cpu"},
        "prompt": {"kind": "none"},
        "task": {"name": "mood", **task(data, "mood")},
        "mixture": {"tasks": {"place": task(data, "place")}, "limit": 10},
        "train": {"method": "model", "steps": 6, "batch": 4, "eval_every": 3, "eval_limit": 4, "lr": 0.01},
    }
    return Recipe.of(table, overrides)


@pytest.mark.parametrize("family", ["t5", "llama", "bert"])
def test_a_mixture_from_recipe_to_record(data: Path, family: str) -> None:
    recipe = mixed(data, family)
    assert list(recipe.mixed) == ["mood", "place"]
    assert Recipe.of(recipe.table()).table() == recipe.table()
    (done,) = tune([recipe], data / "run", show=False)
    for split in ("validation", "test"):
        scores = done.scores[split]
        assert scores["mean"] == pytest.approx((scores["mood.accuracy"] + scores["place.accuracy"]) / 2)
    assert done.outcome.best_score == max(row["mean"] for row in done.outcome.history)
    assert ("place.legal_rate" in done.scores["test"]) == (family != "bert")
    hashes = {f"task:{name}": one.data_hash for name, one in recipe.load_mixed().items()}
    assert done.record["data"] == hashes and done.record["settings"]["mixture"]["limit"] == 10
    (again,) = tune([recipe], data / "run", show=False, resume=True)
    assert again.scores == done.scores


def test_a_mixture_learns_both_tasks(data: Path) -> None:
    torch.manual_seed(0)
    recipe = mixed(
        data, "bert", "train.steps=40", "train.eval_every=40", "train.batch=16", "train.optimiser=adamw"
    )
    (done,) = tune([recipe], data / "run", show=False)
    assert done.scores["test"]["mood.accuracy"] == 1.0 and done.scores["test"]["place.accuracy"] == 1.0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.method=prompt", 'mixture: one model learns several tasks; got train.method = "prompt"'),
        ("prompt.kind=input", 'mixture: has no soft rows; got prompt.kind = "input"; set prompt.kind = "none"'),
        ("prompt.readout=head", "mixture: one head cannot answer several tasks"),
        ("mixture.tasks={}", "mixture.tasks: needs another task; got none; write [mixture.tasks.NAME]"),
        ("task.name=place", "mixture.tasks: 'place' is the name of the recipe's own task too; rename one"),
        ("mixture.rates=equal", 'mixture.limit: only mixture.rates = "proportional" reads it; got 10'),
        ("mixture.tasks.place.lables=[]", "mixture.tasks.place.lables: unknown key; did you mean 'labels'"),
        ("mixture.tasks.place.kind=text", "mixture.tasks.place.labels: the kind 'text' does not read it"),
        ("mixture.sizes=3", "mixture.sizes: unknown key"),
    ],
)  # fmt: skip
def test_what_is_no_mixture(data: Path, override: str, says: str) -> None:
    with pytest.raises(RecipeError) as refused:
        mixed(data, "bert", override)
    assert says in str(refused.value)


def test_a_task_without_files(data: Path) -> None:
    recipe = mixed(data, "bert", f"mixture.tasks.place.train={data / 'nowhere'}:train")
    with pytest.raises(DataError, match="nowhere"):
        tune([recipe], data / "run", show=False)
