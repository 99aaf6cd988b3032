"""Text forms of published data sets: every worked example of every file, and what a user meets when data differs."""

import json
from pathlib import Path
from typing import Any

import pytest

from incipit import files
from incipit.errors import DataError, RecipeError
from incipit.questions import ask
from incipit.recipe import Recipe
from incipit.tasks import catalogue
from incipit.tasks.metrics import compute, same_referent
from incipit.tasks.reshape import RESHAPES, reshaped
from incipit.tasks.task import Task

FORMS = catalogue.names()
SUPERGLUE = ["boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"]
GLUE = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]


def task_of(form: str, folder: Path, rows: list[Any], split: str = "train", **keys: Any) -> Task:
    files.append_jsonl(folder / f"{split}.jsonl", rows[0])
    for row in rows[1:]:
        files.append_jsonl(folder / f"{split}.jsonl", row)
    return Task.load({"form": form, split: str(folder / f"{split}.jsonl"), **keys})


def test_all_data_sets_of_the_paper_are_there() -> None:
    assert len(FORMS) == 31
    assert [f for f in FORMS if f.startswith("superglue/")] == [f"superglue/{n}" for n in SUPERGLUE]
    assert [f for f in FORMS if f.startswith("glue/")] == [f"glue/{n}" for n in GLUE]
    mrqa = ["bioasq", "drop", "duorc", "race", "relationextraction", "squad", "textbookqa"]
    assert [f for f in FORMS if f.startswith("qa/")] == [f"qa/{n}" for n in mrqa]
    used = {catalogue.published(form).get("reshape") for form in FORMS} - {None}
    assert used == set(RESHAPES)


@pytest.mark.parametrize("form", FORMS)
def test_the_worked_examples(form: str, tmp_path: Path) -> None:
    own = catalogue.published(form)
    assert own["worked"] and own["name"] == form.split("/")[1]
    opening = files.read_bytes(catalogue.PUBLISHED / f"{form}.toml").decode().splitlines()[0]
    assert opening.startswith("# ") and any(year in opening for year in ("19", "20", "MRPC", "QQP"))
    for n, worked in enumerate(own["worked"]):
        split = worked.get("split", "train")
        task = task_of(form, tmp_path / str(n), [json.loads(worked["record"])], split)
        (example,) = task.examples(split)
        assert (example.input, example.target) == (worked["input"], worked["target"])
        assert example.group == worked.get("group", "")
        assert list(example.references) == worked.get("references", [worked["target"]])
        assert not example.choices or example.target in example.choices


def test_a_form_and_a_folder_are_a_task(tmp_path: Path) -> None:
    rows = [{"sentence": f"a film {i}", "label": i % 2} for i in range(20)]
    for row in rows:
        files.append_jsonl(tmp_path / "sst2" / "train.jsonl", row)
    files.append_jsonl(tmp_path / "sst2" / "validation.jsonl", {"sentence": "fine", "label": 1})
    plain = Task.load({"form": "glue/sst2", "data": "sst2"}, base=tmp_path)
    assert plain.check() == {"train": 20, "validation": 1} and plain.name == "sst2"
    assert plain.validation[0].input == "sentence: fine" and plain.labels == ("negative", "positive")
    carved = Task.load({"form": "glue/sst2", "data": "sst2", "split": {"validation": 0.1}}, base=tmp_path)
    assert carved.check() == {
        "train": 18,
        "validation": 2,
        "test": 1,
    }  # the official dev split is read as the test
    assert carved.test[0].input == "sentence: fine"
    recipe = Recipe.of({"name": "r", "task": {"form": "glue/sst2", "data": "sst2"}}, base=tmp_path)
    assert recipe.spec.name == "sst2" and recipe.load_task().data_hash == plain.data_hash
    assert Recipe.of(recipe.table(), base=tmp_path).load_task().data_hash == plain.data_hash


def test_a_hub_id_and_its_splits() -> None:
    spec = Task.load({"form": "glue/mnli", "data": "hub"}).spec
    assert (spec.train, spec.validation) == (
        "hub:nyu-mll/glue/mnli:train",
        "hub:nyu-mll/glue/mnli:validation_matched",
    )
    assert Task.load({"form": "glue/mnli", "data": "hub:me/mine"}).spec.train == "hub:me/mine:train"


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"form": "superglue/bolq"}, "form: 'superglue/bolq' is unknown; did you mean 'superglue/boolq'"),
        (
            {"form": "glue/sst2"},
            "data: missing for the form 'glue/sst2'; name a folder of its files, or \"hub\"",
        ),
        ({"form": "reviews/cr", "data": "hub"}, "the form 'reviews/cr' has no hub id; name a folder"),
        ({"name": "a", "kind": "text", "data": "x"}, "data: stands beside a form"),
        (
            {"form": "glue/sst2", "data": "x", "reshape": "sqad"},
            "reshape: 'sqad' is unknown; did you mean 'squad'",
        ),
        ({"form": "glue/sst2", "data": "x", "metrics": ["mean"]}, "'mean' stands alone"),
        ({"form": "glue/sst2", "data": "x", "metrics": ["exact_match_by_group"]}, "group: missing"),
    ],
)
def test_a_form_that_cannot_be_read(table: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as refused:
        Task.load(table)
    assert says in str(refused.value)
    with pytest.raises(RecipeError) as refused:
        Recipe.of({"task": table})
    assert says in str(refused.value)


def test_data_that_is_not_there_or_has_other_fields(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'boolq:train' does not exist"):
        _ = Task.load({"form": "superglue/boolq", "data": "boolq"}, base=tmp_path).train
    files.append_jsonl(tmp_path / "boolq" / "train.jsonl", {"text": "a", "questions": "b", "label": 1})
    with pytest.raises(DataError, match=r"'trian.jsonl' does not exist; did you mean 'train.jsonl'"):
        _ = Task.load({"form": "superglue/boolq", "train": "trian.jsonl"}, base=tmp_path / "boolq").train
    with pytest.raises(DataError, match=r"train.jsonl:1: no field 'passage'; known: label, questions, text"):
        _ = Task.load({"form": "superglue/boolq", "data": "boolq"}, base=tmp_path).train
    with pytest.raises(DataError, match=r"'boolq' holds no file for the split 'validation' \(train.jsonl\)"):
        _ = Task.load({"form": "superglue/boolq", "data": "boolq"}, base=tmp_path).validation
    for form, row, says in [
        ("superglue/wsc", {"text": "Ann ran.", "span1_text": "Ann", "span2_text": "he", "span2_index": 0, "label": 1},
         "no word 'he' near word 0"),
        ("glue/stsb", {"sentence1": "a", "sentence2": "b", "label": "far"}, "a score is a number from 0 to 5"),
        ("reviews/yelp", {"text": "a", "label": 7}, "five stars are written 0 to 4"),
        ("superglue/multirc", {"paragraph": 3, "question": "q", "answer": "a", "label": 1}, "is a number, not text"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=says):
            _ = task_of(form, tmp_path / form, [row]).train


def test_records_that_become_several_or_none() -> None:
    nested = {
        "passage": {
            "text": "Ann met Bo",
            "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 9}, {"start": 0, "end": 2}],
        },
        "qas": [
            {"query": "@placeholder sang", "answers": [{"text": "Ann"}, {"text": "Ann"}, {"text": "Bo"}]}
        ],
    }
    train, dev = (list(reshaped("record", nested, split)) for split in ("train", "validation"))
    assert [r["answers"] for r in train] == [["Ann"], ["Bo"]] and train[0]["entities"] == "Ann, Bo"
    assert [r["answers"] for r in dev] == [["Ann", "Bo"]]
    wsc = {
        "text": "Ann saw that she won.",
        "span1_text": "Bo",
        "span2_text": "she",
        "span2_index": 3,
        "label": 0,
    }
    assert not list(reshaped("wsc", wsc, "train")) and len(list(reshaped("wsc", wsc, "validation"))) == 1
    assert not list(reshaped("five_stars", {"text": "so so", "label": 2}, "train"))
    assert not list(reshaped("mrqa_drop", {"subset": "RACE", "question": "q", "context": "c"}, "test"))
    assert list(reshaped("", {"a": 1}, "train")) == [{"a": 1}]


def test_a_new_record_is_reshaped_as_the_training_data_was(tmp_path: Path) -> None:
    form = {"kind": "span", "input": "question: {question} context: {context}", "reshape": "squad"}
    assert (
        ask(form, {"question": "Who's there?", "context": "Ann."}).input
        == "question: Who ' s there ? context: Ann ."
    )
    with pytest.raises(DataError, match="the record asks 2 questions; give one a record"):
        ask(
            {
                "kind": "classification",
                "input": "{question} {answer}",
                "words": ["no", "yes"],
                "reshape": "multirc",
            },
            {
                "passage": {
                    "text": "",
                    "questions": [{"question": "q", "answers": [{"text": "a"}, {"text": "b"}]}],
                }
            },
        )


def test_the_two_scores_of_multirc(tmp_path: Path) -> None:
    rows = [
        {"paragraph": "p", "question": "q", "answer": str(i), "label": label, "idx": {"question": group}}
        for i, (label, group) in enumerate([(1, 0), (0, 0), (1, 1), (0, 1)])
    ]
    task = task_of("superglue/multirc", tmp_path, rows)
    scores = compute(task.metrics, ["True", "False", "True", "True"], task.train)
    # Of two questions one is all right; F1: 2 hits, 1 false alarm: 4 / 5.
    assert scores == {"mean": pytest.approx(0.65), "f1_binary": pytest.approx(0.8), "exact_match_by_group": 0.5,
                      "legal_rate": 1.0}  # fmt: skip
    illegal = compute(task.metrics, ["maybe", "False", "True", "False"], task.train)
    assert illegal["legal_rate"] == 0.75 and illegal["f1_binary"] == pytest.approx(2 / 3)


def test_cb_counts_a_class_that_nobody_names(tmp_path: Path) -> None:
    rows = [{"premise": "p", "hypothesis": "h", "label": label} for label in ("entailment", "contradiction")]
    task = task_of("superglue/cb", tmp_path, rows)
    scores = compute(task.metrics, ["entailment", "contradiction"], task.train)
    assert scores["f1_macro_all"] == pytest.approx(2 / 3) and scores["mean"] == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("prediction", "phrase", "same"),
    [
        ("the old man", "Old man", True),
        ("man", "the old man", True),
        ("the old man of Rome", "old man", True),
        ("Bob", "Bob's hat", False),
        ("Ann", "Bob", False),
        ("the", "Bob", False),
    ],
)
def test_the_rule_of_wsc(prediction: str, phrase: str, same: bool) -> None:
    assert same_referent(prediction, phrase) is same


def test_wsc_is_scored_against_the_label(tmp_path: Path) -> None:
    record = {"text": "Ann saw that she won.", "span1_text": "Ann", "span2_text": "she", "span2_index": 3}
    task = task_of("superglue/wsc", tmp_path, [{**record, "label": 1}, {**record, "label": 0}], "validation")
    for told, score in [(["Ann", "Bo"], 1.0), (["Ann", "Ann"], 0.5), (["Bo", ""], 0.0)]:
        assert compute(task.metrics, told, task.validation) == {"referent_accuracy": score}
