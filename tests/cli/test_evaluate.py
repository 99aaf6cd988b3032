"""incipit evaluate without artifacts: the frozen model as it is, on a task."""

from pathlib import Path

import pytest

import incipit
from incipit import baselines, files
from incipit.assemble import PromptChoice, make_prompt
from incipit.backbones import load, tiny
from incipit.cli.opened import task_named

from .conftest import Call

TASK = """
name = "own"
kind = "classification"
input = "It is: {text}"
test = "test.jsonl"
train = "test.jsonl"
labels = {positive = "good", negative = "bad"}
"""
ROWS = [
    ("a fine film", "positive"),
    ("a dull one", "negative"),
    ("what a waste", "negative"),
    ("a joy", "positive"),
]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    lines = "".join(f'{{"text": "{text}", "label": "{label}"}}\n' for text, label in ROWS)
    (tmp_path / "test.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "task.toml").write_text(TASK, encoding="utf-8")
    return tmp_path / "task.toml"


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_a_model_is_scored_without_a_prompt(call: Call, tmp_path: Path, task: Path, family: str) -> None:
    tiny.save(family, tmp_path / family)
    line = ("evaluate", "--backbone", tmp_path / family, "--task", task, "--json", tmp_path / "scores.json")
    done = call(*line)
    assert done.code == 0, done.err
    (told,) = files.read_json(tmp_path / "scores.json")
    assert (told["name"], told["task"], told["examples"]) == ("none", "own", 4)
    backbone, chosen = load(str(tmp_path / family)), task_named(str(task))
    bare = make_prompt(PromptChoice(kind="none"), backbone, chosen.labels)
    expected = incipit.evaluate(backbone, bare, chosen.test, chosen.metrics, legality=True).scores
    assert told["scores"] == pytest.approx(expected)
    assert ("legal_rate" in told["scores"]) == (family != "bert")


def test_worked_examples_of_the_task_file_stand_before_the_input(
    call: Call, tmp_path: Path, task: Path
) -> None:
    tiny.save("llama", tmp_path / "llama")
    task.write_text(TASK + "demonstrations = 2\n", encoding="utf-8")
    done = call("evaluate", "--backbone", tmp_path / "llama", "--task", task, "--json", tmp_path / "few.json")
    assert done.code == 0, done.err
    (told,) = files.read_json(tmp_path / "few.json")
    backbone = load(str(tmp_path / "llama"))
    bare = make_prompt(PromptChoice(kind="none"), backbone, ("good", "bad"))
    plain = tmp_path / "plain.toml"
    plain.write_text(TASK, encoding="utf-8")
    expected = baselines.demonstrated(backbone, bare, task_named(str(plain)), 2, 0, incipit.DecodeOptions())
    assert told["scores"]["accuracy"] == pytest.approx(expected["accuracy"])


@pytest.mark.parametrize(
    "given",
    [[], ["--backbone", "builtin:lm"], ["--task", "reviews"], ["--data", "b.jsonl", "--backbone", "x"]],
)
def test_nothing_to_score_is_wrong_usage(call: Call, given: list[str]) -> None:
    done = call("evaluate", *given)
    assert done.code == 2 and "name artifacts; or, to score a model without a prompt, --backbone" in done.err


def test_a_backbone_that_is_not_there_is_told(call: Call, tmp_path: Path, task: Path) -> None:
    done = call("evaluate", "--backbone", tmp_path / "gone", "--task", task)
    assert done.code == 1 and str(tmp_path / "gone") in done.err
