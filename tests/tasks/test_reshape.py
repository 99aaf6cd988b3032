"""Published records in the layouts in which they come: what they become, and what is told instead of left out."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from incipit import files
from incipit.errors import DataError
from incipit.tasks.metrics import compute
from incipit.tasks.reshape import reshaped
from incipit.tasks.task import Task


def test_a_question_of_multirc_is_known_by_its_numbers_or_its_text(tmp_path: Path) -> None:
    """Two paragraphs may number their questions alike; a record without numbers is grouped by what it asks."""
    nested = [
        {"idx": n, "passage": {"text": f"p{n}", "questions": [{"question": "q", "idx": 0, "answers": [
            {"text": "<b>a", "label": 1}, {"text": "b<br>c", "label": 0}]}]}}
        for n in (4, 5)
    ]  # fmt: skip
    rows = [next(iter(reshaped("multirc", record, "validation"))) for record in nested]
    assert [row["group"] for row in rows] == ["4/0", "5/0"] and rows[0]["answer"] == "a"
    assert [row["answer"] for row in reshaped("multirc", nested[0], "validation")] == ["a", "b c"]
    flat = [
        {"paragraph": p, "question": q, "answer": "a", "label": 1, "idx": 3}
        for p, q in ("xu", "xv", "yu", "xu")
    ]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, flat)))
    task = Task.load({"form": "superglue/multirc", "validation": str(tmp_path / "dev.jsonl")})
    assert [e.group for e in task.validation] == ["x\nu", "x\nv", "y\nu", "x\nu"]
    told = ["True", "True", "False", "False"]  # of three questions one is all right
    assert compute(["exact_match_by_group"], told, task.validation)["exact_match_by_group"] == pytest.approx(
        1 / 3
    )


def carved(form: str, folder: Path, rows: list[Any], share: float) -> Task:
    for row in rows:
        files.append_jsonl(folder / "train.jsonl", row)
    return Task.load({"form": form, "train": str(folder / "train.jsonl"), "split": {"validation": share}})


def test_what_is_carved_from_train_is_judged_as_the_official_split_is(tmp_path: Path) -> None:
    """ReCoRD: a query once, with all its answers. WSC: phrases that are right and that are wrong."""
    rows = [
        {
            "passage": "Ann met Bo",
            "query": f"@placeholder sang {n}",
            "entities": ["Ann", "Bo"],
            "answers": ["Ann", "Bo"],
        }
        for n in range(10)
    ]
    record = carved("superglue/record", tmp_path / "r", rows, 0.3)
    assert (len(record.train), len(record.validation)) == (14, 3)
    assert {e.references for e in record.validation} == {("Ann", "Bo")}
    assert [e.target for e in record.train] == ["Ann", "Bo"] * 7
    assert not {e.input for e in record.train} & {e.input for e in record.validation}
    rows = [
        {
            "text": f"Ann saw that she won {n}.",
            "span1_text": "Ann",
            "span2_text": "she",
            "span2_index": 3,
            "label": n % 2,
        }
        for n in range(20)
    ]
    wsc = carved("superglue/wsc", tmp_path / "w", rows, 0.5)
    wrong = sum(e.choice == 0 for e in wsc.validation)
    assert len(wsc.validation) == 10 and 0 < wrong < 10
    assert len(wsc.train) == wrong and all(e.choice == 1 for e in wsc.train)  # 10 right ones in all
    assert not {e.input for e in wsc.train} & {e.input for e in wsc.validation}


@pytest.mark.parametrize(
    ("form", "row", "says"),
    [
        ("superglue/wsc", {"label": -1}, "field 'label' holds -1, which is no label"),
        ("superglue/wsc", {"label": 1, "span2_index": "x"}, "'span2_index' holds 'x'; write the pronoun's place"),
        ("superglue/record", {"answers": []}, "field 'answers' holds nothing"),
        ("superglue/record", {"answers": None}, "field 'answers' holds nothing"),
        ("superglue/record", {"answers": [{"start": 1}]}, "field 'answers.0' is an object, not text"),
        ("superglue/record", {"entities": "Ann"}, "field 'entities' is text, not a list"),
        ("superglue/multirc", {"passage": {"text": "p", "questions": "q"}}, "'passage.questions' is text, not a list"),
        ("superglue/multirc", {"passage": {"text": "p", "questions": ["q"]}}, "'passage.questions.0' is text, not an"),
        ("glue/stsb", {"label": float("inf")}, "a score is a number from 0 to 5"),
        ("glue/stsb", {"label": -1}, "field 'label' holds '-1.0', which is no label"),
        ("glue/stsb", {"label": 5.4}, "field 'label' holds '5.4', which is no label"),
        ("qa/squad", {"paragraphs": 1}, "field 'paragraphs' is a number, not a list of objects"),
        ("qa/drop", {"header": {"dataset": "RACE"}}, "the file holds 'RACE', not 'DROP'; name the file of this set"),
        ("qa/drop", {"subset": "RACE"}, "the reshape 'mrqa_drop' leaves no example for the split 'train'"),
    ],
)  # fmt: skip
def test_nothing_is_left_out_on_the_quiet(form: str, row: dict[str, Any], says: str, tmp_path: Path) -> None:
    whole: dict[str, Any] = {
        "superglue/wsc": {
            "text": "Ann ran; she won.",
            "span1_text": "Ann",
            "span2_text": "she",
            "span2_index": "2",
        },
        "superglue/record": {"passage": "p", "query": "q", "entities": ["Ann"], "answers": "Ann"},
        "glue/stsb": {"sentence1": "a", "sentence2": "b"},
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(whole.get(form, {}) | row))
    with pytest.raises(DataError, match=re.escape(says)):
        _ = Task.load({"form": form, "train": str(tmp_path / "train.jsonl")}).train


def test_wsc_where_spans_and_text_differ() -> None:
    """The phrase is written as the text has it (T5 read SuperGLUE's "wsc.fixed"), the pronoun stands between marks."""
    table = [
        ("The roof", "In the storm the roof fell because it leaked.", "it", 7, "the roof", "because *it* leaked."),
        ("the lawyer", "The lawyer said that (he) left.", "he", "4", "The lawyer", "that ( *he* ) left."),
        ("Canopy\nsings", 'The word " Canopy sings " is long; it is odd.', "it", 8, "Canopy sings", "; *it* is"),
        ("Ann and Bo", "Ann, Bo and Cy sang. They left, they said.", "they", 7, "Ann and Bo", "left, *they* said."),
        ("He", "He who knows him, knows Hector.", "him", 4, "He", "knows *him* , knows Hector."),
    ]  # fmt: skip
    for phrase, text, pronoun, place, referent, marked in table:
        record = {"text": text, "target": {"span1_text": phrase, "span2_text": pronoun, "span2_index": place}}
        (row,) = reshaped("wsc", record, "validation")
        assert row["referent"] == referent and marked in row["text"] and row["text"].count("*") == 2


def test_entities_and_answers_of_record_are_in_one_order() -> None:
    """The published file lists them as they stand in the passage; T5 read them sorted and once."""
    text = "Rome saw Bo and Ann and Bo"
    spans = [
        {"start": 0, "end": 3},
        {"start": 9, "end": 10},
        {"start": 16, "end": 18},
        {"start": 24, "end": 25},
    ]
    answers = [{"text": "Bo"}, {"text": "Ann"}, {"text": "Bo"}]
    nested = {
        "passage": {"text": text, "entities": spans},
        "qas": [{"query": "@placeholder", "answers": answers}],
    }
    (dev,) = reshaped("record", nested, "validation")
    assert (dev["entities"], dev["answers"]) == ("Ann, Bo, Rome", ["Ann", "Bo"])
    flat = {
        "passage": text,
        "query": "@placeholder",
        "entities": ["Ann", "Bo", "Rome"],
        "answers": ["Ann", "Bo"],
    }
    assert list(reshaped("record", flat, "validation")) == [dev]


def test_the_published_files_of_squad_and_mrqa(tmp_path: Path) -> None:
    asked = {
        "question": "Who?",
        "answers": [{"text": "Ann", "answer_start": 0}, {"text": "Ann", "answer_start": 0}],
    }
    article = {
        "title": "t",
        "paragraphs": [{"context": "Ann.", "qas": [asked, asked | {"question": "Who now?"}]}],
    }
    (tmp_path / "dev.json").write_text(json.dumps({"version": "1.1", "data": [article]}))
    squad = Task.load({"form": "qa/squad", "validation": str(tmp_path / "dev.json")}).validation
    assert [e.input for e in squad] == [
        "question: Who ? context: Ann .",
        "question: Who now ? context: Ann .",
    ]
    assert squad[0].references == ("Ann",)
    lines = [
        {"header": {"dataset": "DuoRC.ParaphraseRC", "split": "dev"}},
        {"context": "Ann.", "qas": [{"question": "Who?", "answers": ["Ann", "Ann B."], "detected_answers": []}]},
        {"context": "Bo.", "qas": [{"question": "Who?", "detected_answers": [{"text": "Bo", "char_spans": []}]}]},
    ]  # fmt: skip
    (tmp_path / "duorc.jsonl").write_text("\n".join(map(json.dumps, lines)))
    duorc = Task.load({"form": "qa/duorc", "test": str(tmp_path / "duorc.jsonl")}).test
    assert [e.references for e in duorc] == [("Ann", "Ann B ."), ("Bo",)]
    hub = {"subset": "DuoRC.ParaphraseRC", "question": "Who?", "context": "Ann.", "answers": ["Ann"]}
    assert len(list(reshaped("mrqa_duorc", hub, "test"))) == 1 and not list(
        reshaped("mrqa_drop", hub, "test")
    )
