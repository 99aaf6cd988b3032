"""What a prompt has to beat."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from incipit.assemble import PromptChoice, make_prompt
from incipit.backbones import EncoderBackbone, tiny, wrap
from incipit.baselines import nearest_class_mean
from incipit.encode import encode, question, questions
from incipit.errors import DataError
from incipit.tasks.task import Task, TaskSpec


def task(folder: Path, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> Task:
    for name, rows in (("train", train), ("test", test)):
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    spec = TaskSpec(
        name="t", kind="classification", input="{text}", label="label", labels=["good", "bad", "red"],
        train="train.jsonl", test="test.jsonl",
    )  # fmt: skip
    return Task(spec, folder)


def test_a_class_without_examples_is_never_chosen(tmp_path: Path) -> None:
    backbone = wrap("bert", *tiny.build("bert"))
    assert isinstance(backbone, EncoderBackbone)
    frame = make_prompt(PromptChoice(length=4), backbone, ("good", "bad", "red"), 0)
    assert frame is not None
    rows = [("a fine film", "good"), ("a dull car and a cat", "red")]
    given = task(tmp_path, rows, [*rows, ("a dull film", "bad")])
    assert nearest_class_mean(backbone, frame, given, 0, 0)["accuracy"] == pytest.approx(2 / 3)


def test_a_demonstrated_question_is_read_to_its_end(tmp_path: Path) -> None:
    """Two worked examples of 23 words are too many for 128 positions less 90: the question stays, their start goes."""
    backbone = wrap("t5", *tiny.build("t5"))
    long = "a fine film and a dull car " * 3
    rows = [
        (f"{long}{word}", label)
        for word, label in zip(["one", "two", "three", "red"], ["good", "bad"] * 2, strict=True)
    ]
    given = task(tmp_path, rows, [("is the film good", "good")])
    few = Task(replace(given.spec, labels=["good", "bad"], demonstrations=2), tmp_path)
    shown = few.test[0]
    assert shown.input[shown.worked :] == "is the film good"
    read = question(backbone, shown, room=90).input_ids
    assert len(read) == 38 and backbone.decode(read).endswith("is the film good")
    assert questions(backbone, shown, ["good", "bad"], room=90)[1].input_ids == read
    assert encode(backbone, shown, room=90).input_ids == read


def test_a_task_without_classes(tmp_path: Path) -> None:
    backbone = wrap("bert", *tiny.build("bert"))
    assert isinstance(backbone, EncoderBackbone)
    frame = make_prompt(PromptChoice(length=1), backbone, ("good",), 0)
    (tmp_path / "train.jsonl").write_text('{"text": "a", "target": "b"}')
    spec = TaskSpec(name="t", kind="text", input="{text}", label="target", train="train.jsonl")
    with pytest.raises(DataError, match="nearest class mean needs label words"):
        nearest_class_mean(backbone, frame, Task(spec, tmp_path), 4, 0)  # type: ignore[arg-type]
