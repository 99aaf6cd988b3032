"""A spec lists all its problems at once, each with its key, the nearest name and what to do."""

from typing import Any

import pytest

from incipit.errors import RecipeError
from incipit.tasks.spec import TaskSpec

GOOD: dict[str, dict[str, Any]] = {
    "classification": {"input": "{text}", "labels": ["bad", "good"]},
    "multiple_choice": {"input": "{q}", "choices": ["{a}", "{b}"]},
    "text": {"input": "{q}", "target": "{a}"},
    "span": {"input": "{q}"},
    "chat": {},
}


def table(kind: str = "classification", **changes: Any) -> dict[str, Any]:
    return {"name": "t", "kind": kind, "train": "a.jsonl"} | GOOD[kind] | changes


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_spec_has_no_problems(kind: str) -> None:
    spec = TaskSpec.of(table(kind))
    assert spec.problems() == []
    assert spec.metric_names()


def test_an_empty_table_is_a_split_that_is_not_there() -> None:
    assert TaskSpec.of(table(test={}, validation="")).test == ""


def test_labels_from_python_may_be_numbers() -> None:
    assert TaskSpec.of(table(labels={0: "bad", 1: "good"})).problems() == []


def test_metrics_by_default_and_by_choice() -> None:
    assert TaskSpec.of(table()).metric_names() == ("accuracy", "f1_macro")
    assert TaskSpec.of(table(metrics=["mcc"])).metric_names() == ("mcc",)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (table(lables=["a"]), "task lables: unknown key; did you mean 'labels'?"),
        (
            table() | {"kind": "clasification"},
            "kind: 'clasification' is unknown; did you mean 'classification'?",
        ),
        (table(name=""), "name: missing; give the task a name"),
        (table(input=""), "input: missing; the kind 'classification' needs it"),
        (table(input=3), "input: 3 is no text; put it in quotes"),
        (table(input="{text:>3}"), "input: template '{text:>3}'"),
        (table(target="{a}"), "target: the kind 'classification' does not read it; remove it"),
        (table("span", label="answer"), "label: the kind 'span' does not read it; remove it"),
        (table("chat", input="{x}"), "input: the kind 'chat' does not read it; remove it"),
        (table(labels=[]), "labels: 0 label words; a classification needs two or more"),
        (table(labels={"0": "x", "1": "x "}), "labels: 1 label words"),
        (table(labels=["a", "b", "b"]), "labels: a word is there twice"),
        (table(labels=["a", " "]), "labels: a label word is empty; write a word that the model can say"),
        (table(labels={"0": 1, "1": 2}), "write a list of words in quotes, or a table raw value = word"),
        (table("multiple_choice", labels={"A": "0"}), "labels: a table; for multiple_choice write the list"),
        (table("multiple_choice", labels=["A"]), "labels: 1 names for 2 choices; name each choice once"),
        (table("multiple_choice", labels=["A", "A"]), "labels: a name is there twice"),
        (table("multiple_choice", choices=["{a}"]), "choices: one option leaves nothing to choose"),
        (table("multiple_choice", choices=[]), "choices: missing; the kind 'multiple_choice' needs it"),
        (
            table("multiple_choice", choices=[1, 2]),
            "choices: [1, 2]; write a list of templates, or the name of a field",
        ),
        (table("multiple_choice", choices=["{a", "{b}"]), "choices: template '{a': lone '{'"),
        (table(metrics="accuracy"), "metrics: 'accuracy'; write a list of names"),
        (table(metrics=["acuracy"]), "metrics: 'acuracy' is unknown; did you mean 'accuracy'?"),
        (
            table(metrics=["bleu"]),
            "'bleu' does not fit the kind 'classification'; use accuracy, f1_binary, f1_macro",
        ),
        (
            table(metrics=["f1_binary"], labels=["a", "b", "c"]),
            "'f1_binary' needs two label words, not 3; use f1_macro",
        ),
        (
            table(train=""),
            "train, validation, test: all missing; name a file, a folder or hub:owner/name:split",
        ),
        (table(split={"validation": 1.5}), "split.validation: 1.5 is no share between 0 and 1"),
        (table(split={"validation": "0.1"}), "split.validation: '0.1' is no share between 0 and 1"),
        (table(split={"dev": 0.1}), "split.dev: unknown key; known: seed, test, validation"),
        (
            table(split={"validation": 0.5, "test": 0.5}),
            "split: the shares add up to 1; leave some for train",
        ),
        (table(split={"validation": 0.1, "seed": -1}), "split.seed: -1 is no whole number from 0"),
        (table(split=[0.1]), "split: [0.1]; write a table: {validation = 0.1, seed = 0}"),
        (
            table(split={"test": 0.1}, test="b.jsonl"),
            "split.test: test has its own source 'b.jsonl'; remove one",
        ),
        (
            table(train="", test="b.jsonl", split={"validation": 0.1}),
            "split: there is no train to carve from",
        ),
        (table(train="", test="b.jsonl", shots=2), "shots: there is no train to take them from; name train"),
        (table(shots=-1), "shots: -1 is no whole number from 0"),
        (table(limit=True), "limit: True is no whole number from 0"),
        (table(streaming=1), "streaming: 1; write true or false"),
        (table(streaming=True, shots=2), "shots: needs the whole of train, and streaming never holds it"),
        (
            table(streaming=True, test="b.jsonl"),
            "limit: missing; when streaming it says how many validation and",
        ),
        (
            table("chat", demonstrations=2),
            "demonstrations: a chat has no single input to put them before; set 0",
        ),
    ],
)
def test_a_bad_spec(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        TaskSpec.of(spec)
    assert message in str(caught.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        TaskSpec.of({"lables": [], "kind": "text", "input": "{", "train": "a"})
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()] == [
        "3 problems in the task",
        "lables",
        "name",
        "input",
    ]
