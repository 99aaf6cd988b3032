"""Sweeps: keys and values as texts, one bundle wherever possible, chosen on dev, only the best read on test."""

import json
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from incipit import artifact, files, record
from incipit.backbones import Backbone, tiny, wrap
from incipit.errors import Interrupted, RecipeError, TrainingError
from incipit.evaluation import Evaluation, Trial, evaluate_all
from incipit.recipe import Recipe
from incipit.recipe.sweeps import axes, combinations, full_key
from incipit.run import Swept, bundle, curves, sweep, tune
from incipit.train import checkpoint

REVIEWS = {"builtin": "reviews", "limit": 12}


@pytest.fixture(scope="session")
def llama() -> Backbone:
    return wrap("llama", *tiny.build("llama"))


def recipe(task: dict[str, Any] = REVIEWS, name: str = "mood", **train: Any) -> Recipe:
    return Recipe.of(
        {
            "name": name,
            "backbone": {"name": "tiny:llama", "device": "cpu"},
            "prompt": {"length": 4},
            "task": task,
            "train": {"steps": 4, "batch": 3, "eval_every": 2} | train,
            "decode": {"max_new_tokens": 2},
        }
    )


# -- keys and values -----------------------------------------------------------------------------------------------


def test_values_are_toml_or_words() -> None:
    found = axes(
        [
            "lr=0.03, 1e-1,1",
            "prompt.start=label,'text'",
            'task.choices=["{a}, x", "{b}"],[]',
            "save_every=1_000",
        ]
    )
    assert found == {
        "train.lr": [0.03, 0.1, 1],
        "prompt.start": ["label", "text"],
        "task.choices": [["{a}, x", "{b}"], []],
        "train.save_every": [1000],
    }
    assert axes(["tensorboard=true,false", "task.split.validation=0.1"]) == {
        "train.tensorboard": [True, False], "task.split.validation": [0.1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lenght=3", "unknown key 'lenght'; did you mean 'prompt.length'?"),
        ("train.lenght=3", "unknown key 'train.lenght'; did you mean 'prompt.length'?"),
        ("zzzz=3", "unknown key 'zzzz'; see the tables"),
        ("batch=2,3", "'batch' is a key of several tables; got 'batch'; write train.batch or decode.batch"),
        ("seeds=1,2", "'seeds' is no key of a sweep; give --seeds N"),
        ("name=a,b", "'name' is no key of a sweep; each member is named by its values"),
        ("lr", "is no sweep; got 'lr'; write a key and its values: lr=0.03,0.1"),
        ("lr=", "is no sweep; got 'lr='"),
        ("lr=0.1,,0.2", "a value does not parse; got ''; write TOML"),
        ("lr=[0.1", r"a value does not parse; got '\[0.1'"),
        ("lr=0.1,0.10", "a value is there twice; got 0.1; write each once"),
    ],
)
def test_words_of_the_errors(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        axes([text])


def test_all_problems_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        axes(["lr=0.1", "train.lr=0.2", "lenght=3"])
    assert str(caught.value).splitlines()[0] == "the sweep: 2 problems:"
    assert "train.lr is swept already; got 'train.lr=0.2'; write all its values in one --sweep" in str(
        caught.value
    )


def test_combinations_are_the_product_each_with_its_name() -> None:
    cells = combinations(recipe(), {"train.lr": [0.03, 0.1], "prompt.length": [5, 20]}, range(2))
    assert [c.recipe.name for c in cells] == [
        "mood-lr0.03-length5", "mood-lr0.03-length20", "mood-lr0.1-length5", "mood-lr0.1-length20",
    ]  # fmt: skip
    assert [(c.recipe.train.lr, c.recipe.prompt.length) for c in cells] == [
        (0.03, 5),
        (0.03, 20),
        (0.1, 5),
        (0.1, 20),
    ]
    assert all(
        c.recipe.train.seeds == (0, 1) and c.recipe.train.steps == 4 and c.base == "mood" for c in cells
    )


def test_names_of_words_and_long_values() -> None:
    def names(**over: Any) -> list[str]:
        cells = combinations(recipe(), {full_key(k.replace("__", ".")): v for k, v in over.items()})
        return [c.recipe.name for c in cells]

    assert names(start=["label", "vocabulary"]) == ["mood-start-label", "mood-start-vocabulary"]
    assert names(backbone__name=["builtin:lm", "builtin:t5"]) == [
        "mood-name-builtin-lm",
        "mood-name-builtin-t5",
    ]
    assert names(tensorboard=[True]) == ["mood-tensorboard-true"]
    alike = names(layout=["{soft} a", "{soft} a!"])  # written alike: told apart by a hash
    assert len(set(alike)) == 2 and all(n.startswith("mood-layout-soft-a-") for n in alike)
    both = combinations(recipe(), {"backbone.name": ["builtin:lm"], "task.name": ["x"]})
    assert both[0].recipe.name == "mood-backbone-name-builtin-lm-task-name-x"


def test_defaults_that_follow_other_choices_follow_the_sweep() -> None:
    starts = [c.recipe.prompt.start for c in combinations(recipe(), {"task.builtin": ["reviews", "items"]})]
    assert starts == ["label", "vocabulary"]
    rates = [c.recipe.train.lr for c in combinations(recipe(), {"train.method": ["prompt", "model"]})]
    assert rates == [0.03, 0.001]
    assert recipe(lr=0.5).varied({"prompt.length": 9}).train.lr == 0.5


def test_a_combination_that_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"mood at train.lr = -1: train.lr: needs a number above 0.0; got -1"
    ):
        sweep([recipe()], {"lr": [0.1, -1]}, tmp_path)
    with pytest.raises(RecipeError, match="nothing to sweep: give at least one recipe"):
        sweep([], {"lr": [0.1]}, tmp_path)
    with pytest.raises(RecipeError, match=r"train\.lr is swept over no value"):
        sweep([recipe()], {"lr": []}, tmp_path)
    assert not any(tmp_path.iterdir())


# -- training, choosing --------------------------------------------------------------------------------------------


class Read:
    """Which prompts were scored on which split."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tested: list[str] = []

        def watched(backbone: Backbone, trials: list[Trial], *, legality: bool = False) -> list[Evaluation]:
            self.tested += [t.examples[0].source for t in trials if legality]
            return evaluate_all(backbone, trials, legality=legality)

        monkeypatch.setattr(bundle, "evaluate_all", watched)


def consistent(swept: Swept, best: str) -> None:
    """The best has the highest mean on dev, and only its members have a test score."""
    means = {row.name: row.dev.mean for row in swept.rows if row.dev}
    assert means[best] == max(means.values()) and [row.name for row in swept.best] == [best]
    for row in swept.rows:
        members = [t for t in swept.tuned if t.record["settings"]["name"] == row.name]
        assert tuple(t.seed for t in members) == row.seeds
        scores = [t.outcome.best_score for t in members]
        assert row.dev is not None and list(row.dev.each) == scores
        assert row.dev.mean == pytest.approx(statistics.fmean(scores))
        assert all(("test" in t.scores) == (row.name == best) for t in members)
        assert (row.test is not None) == (row.name == best)
        for one in members:
            assert artifact.load(one.place).card["scores"] == one.scores == one.record["scores"]


def test_a_sweep_is_one_bundle_and_only_its_best_is_tested(
    tmp_path: Path, llama: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Read(monkeypatch)
    over = {"lr": [1e-9, 0.3], "length": [2, 5]}
    swept = sweep([recipe()], over, tmp_path, seeds=range(2), show=False, backbone=llama)
    assert files.exists(tmp_path / checkpoint.FILE)  # all of them together
    assert len(swept.tuned) == 8 and len(swept.rows) == 4
    assert (
        swept.tuned[0].name == "mood-lr1e-09-length2-s0" and swept.tuned[-1].name == "mood-lr0.3-length5-s1"
    )
    (best,) = swept.best
    consistent(swept, best.name)
    assert len(read.tested) == 2  # its two seeds
    assert best.test is not None and best.test.deviation is not None
    told = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["name"] for row in told] == [row.name for row in swept.rows]
    assert Path(swept.figure).read_bytes().startswith(b"\x89PNG")

    alone = recipe(lr=0.3, seeds=[1]).varied({"name": "alone", "prompt.length": 5})
    (solo,) = tune([alone], tmp_path / "alone", show=False, backbone=llama)
    ours = next(t for t in swept.tuned if t.name == "mood-lr0.3-length5-s1")
    assert ours.outcome.history == solo.outcome.history
    for key, tensor in artifact.load(solo.place).tensors.items():
        torch.testing.assert_close(artifact.load(ours.place).tensors[key], tensor, rtol=0, atol=1e-5)


def test_a_smaller_perplexity_is_better(tmp_path: Path, llama: Backbone) -> None:
    swept = sweep(
        [recipe(REVIEWS | {"metrics": ["perplexity"]})],
        {"lr": [1e-9, 0.3]},
        tmp_path,
        show=False,
        backbone=llama,
    )
    still, moved = swept.rows
    assert still.dev is not None and moved.dev is not None and moved.dev.mean < still.dev.mean
    assert moved.best and not still.best and moved.dev.deviation is None


def test_what_cannot_share_a_step_is_trained_in_turn(
    tmp_path: Path, llama: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Read(monkeypatch)
    swept = sweep([recipe(lr=0.3)], {"steps": [2, 4]}, tmp_path, seeds=range(2), show=False, backbone=llama)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["mood-steps2", "mood-steps4"]
    (best,) = swept.best
    consistent(swept, best.name)
    assert len(read.tested) == 2


def test_each_recipe_and_each_task_has_its_best(tmp_path: Path, llama: Backbone) -> None:
    more = recipe({"builtin": "items", "limit": 12}, "desk")
    swept = sweep([recipe(), more], {"lr": [0.1, 0.3]}, tmp_path, show=False, backbone=llama)
    assert [row.base for row in swept.best] == ["mood", "desk"]
    both = sweep(
        [recipe(lr=0.1)],
        {"task.builtin": ["reviews", "items"]},
        tmp_path / "tasks",
        show=False,
        backbone=llama,
    )
    assert [(row.task, row.best) for row in both.rows] == [("reviews", True), ("items", True)]


def test_seeds_alone_give_mean_and_deviation(tmp_path: Path, llama: Backbone) -> None:
    swept = sweep([recipe(lr=0.3)], {}, tmp_path, seeds=range(3), show=False, backbone=llama)
    (row,) = swept.rows
    assert (row.name, row.seeds, row.values, row.best) == ("mood", (0, 1, 2), {}, True)
    assert [t.name for t in swept.tuned] == ["mood-s0", "mood-s1", "mood-s2"] and row.test is not None


def test_a_sweep_needs_validation_to_choose_on(tmp_path: Path, llama: Backbone) -> None:
    data = tmp_path / "all.jsonl"
    data.write_text('{"text": "fine", "label": "a"}\n{"text": "dull", "label": "b"}\n' * 4)
    task = {"kind": "classification", "input": "{text}", "labels": {"a": "good", "b": "bad"},
            "train": str(data), "test": str(data)}  # fmt: skip
    with pytest.raises(RecipeError, match="a sweep chooses on validation, which the task 'mood' lacks"):
        sweep([recipe(task)], {"lr": [0.1, 0.3]}, tmp_path / "a", show=False, backbone=llama)
    swept = sweep(
        [recipe(task)], {}, tmp_path / "b", seeds=[0, 1], show=False, backbone=llama
    )  # nothing to choose
    assert swept.rows[0].dev is None and swept.rows[0].test is not None
    assert swept.note == "no figure: no combination was scored on validation"


def test_a_sweep_over_model_tuning_reads_each_model_again(tmp_path: Path) -> None:
    tiny.save("bert", tmp_path / "bert")
    table = recipe().table()
    table["backbone"]["name"], table["prompt"] = str(tmp_path / "bert"), {"kind": "none"}
    table["train"] |= {"method": "model", "optimiser": "adamw"}
    swept = sweep([Recipe.of(table)], {"lr": [1e-9, 0.01]}, tmp_path / "run", show=False)
    assert all(t.place == "" for t in swept.tuned)
    (best,) = swept.best
    table["train"] |= {"lr": best.values["train.lr"]}
    (alone,) = tune([Recipe.of(table)], tmp_path / "alone", show=False)
    assert best.test is not None and best.test.each == (alone.scores["test"]["accuracy"],)


# -- however it ends -----------------------------------------------------------------------------------------------


def rows_of(swept: Swept) -> list[dict[str, Any]]:
    return swept.table()


def test_a_stopped_sweep_goes_on(tmp_path: Path, llama: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    over = {"steps": [4, 6], "lr": [0.1, 0.3]}
    whole = sweep([recipe()], over, tmp_path / "whole", show=False, backbone=llama)
    calls: list[int] = []

    def pressing(backbone: Backbone, trials: list[Trial], **more: Any) -> list[Evaluation]:
        calls.append(len(trials))
        if len(calls) == 3:  # the first evaluation of the second bundle
            signal.raise_signal(signal.SIGINT)
        return evaluate_all(backbone, trials, **more)

    with monkeypatch.context() as patch:
        patch.setattr(bundle, "evaluate_all", pressing)
        with pytest.raises(Interrupted, match="interrupted after step 3 of 6; the state is saved"):
            sweep([recipe()], over, tmp_path / "parts", show=False, backbone=llama)
    assert not list((tmp_path / "parts").glob("*/record.jsonl"))
    with pytest.raises(TrainingError, match="holds a run already: pass --resume"):
        sweep([recipe()], over, tmp_path / "parts", show=False, backbone=llama)
    again = sweep([recipe()], over, tmp_path / "parts", show=False, backbone=llama, resume=True)
    assert rows_of(again) == rows_of(whole)
    for one, other in zip(again.tuned, whole.tuned, strict=True):
        assert all(
            torch.equal(t, artifact.load(other.place).tensors[k])
            for k, t in artifact.load(one.place).tensors.items()
        )
    finished = sweep([recipe()], over, tmp_path / "parts", show=False, backbone=llama, resume=True)
    assert rows_of(finished) == rows_of(whole)
    assert all(len(record.read(p)) == 2 for p in (tmp_path / "parts").glob("*/record.jsonl"))


# -- the figure ----------------------------------------------------------------------------------------------------


def test_without_matplotlib_all_else_works(
    tmp_path: Path, llama: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    swept = sweep([recipe()], {"lr": [0.1, 0.3]}, tmp_path, show=False, backbone=llama)
    assert (swept.figure, swept.note) == ("", "no figure without matplotlib: pip install matplotlib")
    assert files.exists(tmp_path / "sweep.json") and not files.exists(tmp_path / "sweep.png")


def test_a_seed_that_stopped_keeps_its_last_score() -> None:
    steps, each = curves._together([[(2, 0.5), (4, 0.7)], [(2, 0.1), (4, 0.3), (6, 0.9)]])
    assert (steps, each) == ([2, 4, 6], [[0.5, 0.1], [0.7, 0.3], [0.7, 0.9]])
    means, low, high = curves._band(each)
    assert means == pytest.approx([0.3, 0.5, 0.8])
    assert high[2] - means[2] == means[2] - low[2] == pytest.approx(0.1 * 2**0.5)  # n - 1
