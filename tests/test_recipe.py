"""Recipes: what is read is what is written, and every problem is said at once, in words."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from incipit.errors import RecipeError
from incipit.recipe import Recipe, settings_of

REVIEWS = {"task": {"builtin": "reviews"}}
MOOD_TASK: dict[str, object] = {
    "name": "mood",
    "kind": "classification",
    "input": "{text}",
    "labels": ["bad", "good"],
    "train": "mood.jsonl",
    "split": {"validation": 0.5},
}
MOOD = {"task": MOOD_TASK}


def problems(table: Mapping[str, object], *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.of(table, overrides)
    head, *lines = str(caught.value).splitlines()
    if not lines:
        return [head.removeprefix("the recipe: ")]
    assert head == f"the recipe: {len(lines)} problems:"
    return [line.strip() for line in lines]


def test_defaults_and_a_round_trip_through_toml(tmp_path: Path) -> None:
    recipe = Recipe.of(REVIEWS, ["prompt.length=5", "train.seeds=[0, 1]", "name=first"])
    assert (recipe.name, recipe.prompt.length, recipe.train.seeds) == ("first", 5, (0, 1))
    assert recipe.load_task().labels == ("bad", "good")
    (tmp_path / "first.toml").write_text(recipe.toml())
    again = Recipe.read(tmp_path / "first.toml")
    assert again.table() == recipe.table() and again.spec == recipe.spec
    assert Recipe.of(again.table()).toml() == recipe.toml()


def test_paths_of_a_task_start_at_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mood.jsonl").write_text("".join(f'{{"text": "t{i}", "label": "good"}}\n' for i in range(4)))
    Path(tmp_path / "mood.toml").write_text(Recipe.of(MOOD).toml())
    task = Recipe.read(tmp_path / "mood.toml").load_task()
    assert (len(task.train), len(task.validation)) == (2, 2)


def test_a_recipe_with_the_mark_and_the_line_ends_of_windows(tmp_path: Path) -> None:
    text = 'name = "mine"\n[task]\nbuiltin = "reviews"\n'
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert Recipe.read(tmp_path / "mine.toml").name == "mine"


def test_a_built_in_task_takes_changes() -> None:
    recipe = Recipe.of(REVIEWS, ["task.shots=3"])
    assert recipe.spec.shots == 3 and len(recipe.load_task().train) == 6
    assert recipe.table()["task"] == {"builtin": "reviews", "shots": 3}


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("3", 3), ("0.5", 0.5), ('"3"', "3"), ("[1, 2]", [1, 2]), ("{a = 1}", {"a": 1}),
     ("two words", "two words"), ("", ""), ("2020-01-01", "2020-01-01"), ("1\ny = 2", "1\ny = 2")],
)  # fmt: skip
def test_values_of_set_are_toml_or_else_text(text: str, value: object) -> None:
    from incipit.recipe.problems import overridden

    assert overridden({}, [f"a.b={text}"]) == ({"a": {"b": value}}, [])


def test_overrides_leave_the_table_alone() -> None:
    table = {"task": {"builtin": "reviews"}}
    Recipe.of(table, ["task.shots=3"])
    assert table == REVIEWS


def test_all_problems_at_once() -> None:
    table = {
        **REVIEWS, "promt": {}, "length": 3, "name": "a b",
        "prompt": {"lenght": 3, "kind": "prefx"}, "train": {"steps": 0, "lr": "fast", "batch": 1.5},
        "decode": {"sample": 1, "beams": True, "top_p": float("nan")},
    }  # fmt: skip
    assert problems(table, "task.shotz=1", "oops", "name.x=1", "backbone.device=3") == [
        "--set oops: is no setting; got 'oops'; write a path and a value: prompt.length=20",
        "name.x: name is no table; got 'a b'; set it whole",
        "promt: unknown key; did you mean 'prompt'?",
        "length: unknown key; did you mean 'prompt.length'?",
        "task.shotz: unknown key; did you mean 'shots'?",
        "name: needs letters, digits, dots, dashes and underscores; got 'a b'; the default is \"run\"",
        'backbone.device: needs text in quotes; got 3; the default is "auto"',
        'prompt.kind: needs one of "input", "prefix", "none"; got \'prefx\'; did you mean \'prefix\'?',
        "prompt.lenght: unknown key; did you mean 'length'?",
        "train.steps: needs a whole number from 1; got 0; the default is 1000",
        "train.batch: needs a whole number; got 1.5; the default is 32",
        "train.lr: needs a number; got 'fast'; the default is 0.03",
        "decode.beams: needs a whole number; got True; the default is 1",
        "decode.sample: needs true or false; got 1; the default is false",
        "decode.top_p: needs a finite number; got nan; the default is 1.0",
    ]


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("task.builtin=revews", "task.builtin: no built-in task 'revews'; did you mean 'reviews'?"),
        ("task.shots=many", "task.shots: 'many' is no whole number from 0"),
        ("task=3", "task: needs a table; got 3; write it as [task]"),
        ("backbone=minilm", "backbone: needs a table; got 'minilm'; write it as [backbone]"),
        ("prompt.start=text", 'prompt.text: missing; prompt.start = "text" starts from it; describe'),
        ("prompt.start=given", 'prompt.source: missing; prompt.start = "given" starts from it; name'),
        ("prompt.text=x", "prompt.text: only prompt.start = \"text\" reads it; got 'x'; remove it, or set"),
        ('prompt.sites=["decoder"]', 'prompt.sites: only prompt.kind = "prefix" reads it'),
        ("prompt.hidden=64", 'prompt.hidden: only prompt.reparametrise = "mlp" or "lstm" reads it; got 64'),
        ('prompt.attention="isolatd"', 'prompt.attention: needs one of "joint", "isolated", "joint-causal",'),
        ("prompt.head_lr=1", 'prompt.head_lr: only prompt.readout = "head" reads it; got 1'),
        ("prompt.layout=a {sft} {soft}", "prompt.layout: no part is named {sft}; got 'a {sft} {soft}'; did"),
        ("prompt.layout={soft}{soft}", "prompt.layout: names {soft} 2 times; got '{soft}{soft}'; write"),
        ("prompt.layout=You sort.", "prompt.layout: has no place for the soft rows; got 'You sort.'; write"),
        ("prompt.length=1", 'prompt.length: prompt.start = "label" needs a row for each of 2 label words'),
        ("prompt.kind=none", 'train.method: nothing is trained; got "prompt" with prompt.kind = "none"'),
        ("train.warmup=1001", "train.warmup: longer than the run; got 1001 of 1000 steps; shorten it"),
        ("train.seeds=[]", "train.seeds: needs at least one seed; got []; the default is [0]"),
        ("train.seeds=[1, 1]", "train.seeds: a seed is there twice; got [1, 1]; name each once"),
        ("train.seeds=[-1]", "train.seeds.0: needs a whole number from 0; got -1"),
        ("decode.top_k=5", "decode.top_k: only decode.sample = true reads it; got 5; remove it, or set"),
    ],
)  # fmt: skip
def test_one_problem(setting: str, problem: str) -> None:
    (found,) = problems(REVIEWS, setting)
    assert found.startswith(problem)


def test_what_cannot_be_isolated() -> None:
    (found,) = problems(REVIEWS, "prompt.kind=prefix", "prompt.attention=isolated")
    assert found.startswith('prompt.attention: keys and values never see the input; got "isolated" with')
    model = ("train.method=model", "prompt.kind=none", "prompt.attention=isolated")
    (found,) = problems(REVIEWS, *model)
    assert found.startswith('prompt.attention: only prompt.kind = "input" or prompt.layout reads it')
    assert Recipe.of(REVIEWS, [*model, "prompt.layout=Sort."]).prompt.attention == "isolated"
    assert Recipe.of(REVIEWS).table()["prompt"]["attention"] == "joint"  # named, also where it is the default


def test_text_stands_behind_keys_and_values() -> None:
    (found,) = problems(REVIEWS, "prompt.kind=prefix", "prompt.layout={bos}{soft}")
    assert found.startswith("prompt.layout: keys and values enter before every input, so nothing stands")
    (found,) = problems(REVIEWS, "prompt.kind=none", "train.method=model", "prompt.layout={soft}")
    assert 'prompt.kind = "none" has no soft rows' in found


def test_a_rule_is_judged_though_another_table_is_broken() -> None:
    found = problems(REVIEWS, "train.steps=0", "decode.top_k=2", "prompt.text=x")
    assert [p.split(":")[0] for p in found] == ["train.steps", "prompt.text", "decode.top_k"]


def test_two_learning_rates() -> None:
    (found,) = problems(REVIEWS, "train.lr=0.1", "train.lr_absolute=0.3")
    assert found == "train.lr_absolute: stands in place of train.lr; got 0.3 beside lr = 0.1; remove one"


def test_a_missing_task_and_a_task_without_train() -> None:
    assert problems({}) == [
        'task: missing; got no [task] table; write [task] with builtin = "reviews" or your data'
    ]
    only_test = {"task": {**MOOD_TASK, "train": "", "split": {}, "test": "mood.jsonl"}}
    (found,) = problems(only_test)
    assert found.startswith("task.train: missing; it is learned from")


def test_patience_needs_validation() -> None:
    (found,) = problems({"task": {**MOOD_TASK, "split": {}}}, "train.patience=3")
    assert found.startswith("train.patience: is judged on validation, which the task lacks; got 3")


def test_free_text_starts_from_the_vocabulary_and_is_not_ranked() -> None:
    story = {"task": {"name": "story", "kind": "text", "input": "{a}", "target": "{b}", "train": "a.jsonl"}}
    assert Recipe.of(story).prompt.start == "vocabulary"
    (found,) = problems(story, "prompt.start=label")
    assert found == 'prompt.start: the task has no label words; got "label"; set "vocabulary" or "text"'
    (found,) = problems(story, "decode.mode=rank")
    assert found == (
        'decode.mode: a task of kind "text" has no choices to rank; got "rank"; set "generate" or "auto"'
    )


def test_model_tuning_has_its_own_rate() -> None:
    recipe = Recipe.of(REVIEWS, ["train.method=model", "prompt.kind=none"])
    assert recipe.train.lr == 0.001
    assert Recipe.of(REVIEWS, ["train.method=model", "train.lr=0.01"]).train.lr == 0.01


def test_a_recipe_does_not_change() -> None:
    recipe = Recipe.of(REVIEWS)
    with pytest.raises(ValueError, match="frozen"):
        recipe.prompt.length = 3  # type: ignore[misc]


def test_problems_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('nmae = "x"\n[task]\nbuiltin = "reviews"\n')
    with pytest.raises(RecipeError, match=r"a\.toml: nmae: unknown key; did you mean 'name'\?$"):
        Recipe.read(tmp_path / "a.toml")


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True)
class Settings:
    name: str
    words: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)


def test_settings_of_a_dataclass() -> None:
    made = settings_of(Settings, {"name": "x", "words": ["a"]}, ["inner.rate=0.5"])
    assert made == Settings("x", ("a",), Inner(0.5))
    with pytest.raises(RecipeError) as caught:
        settings_of(Settings, {"wrods": [], "inner": {"rat": 1, "rate": "x"}})
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "wrods: unknown key; did you mean 'words'?",
        "inner.rat: unknown key; did you mean 'rate'?",
        "name: missing; write name = ...",
        "inner.rate: needs a number; got 'x'; the default is 0.1",
    ]


def test_import_is_light() -> None:
    code = "import sys, incipit.recipe; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_built_in_task_takes_a_name_and_data_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"text": "fine", "label": "positive"}\n')
    (tmp_path / "r.toml").write_text('[task]\nbuiltin = "reviews"\nname = "mine"\ntest = "mine.jsonl"\n')
    task = Recipe.read(tmp_path / "r.toml").load_task()
    assert (task.name, len(task.test), task.test[0].target) == ("mine", 1, "good")
