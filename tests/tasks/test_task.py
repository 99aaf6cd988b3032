"""Tasks from files: lazy splits, carving, shots, demonstrations, streams, hashes, and the built-in ones."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import incipit
from incipit.errors import DataError, RecipeError
from incipit.tasks.example import Example, Message
from incipit.tasks.task import Task, builtin, builtin_names

SPEC = {"name": "mood", "kind": "classification", "input": "{text}", "labels": ["bad", "good"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train: 10 good and 20 bad; validation: 2 bad, 1 good; test: 1 good."""
    write(tmp_path / "train.jsonl", [i % 3 == 0 for i in range(30)])
    write(tmp_path / "validation.jsonl", [False, False, True])
    write(tmp_path / "test.jsonl", [True])
    return tmp_path


def write(path: Path, labels: list[bool]) -> None:
    rows = [{"text": f"{path.stem} {i}", "label": int(label)} for i, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def task(folder: Path, **changes: Any) -> Task:
    return Task.load(SPEC | {"train": "train.jsonl"} | changes, base=folder)


def test_splits_are_read_when_asked_for(folder: Path) -> None:
    mood = task(folder, validation="validation.jsonl", test="missing.jsonl")
    assert (len(mood.train), len(mood.validation)) == (30, 3)
    assert mood.train[0].source == "train.jsonl:1"
    with pytest.raises(DataError, match=r"'missing\.jsonl' does not exist"):
        _ = mood.test


def test_a_split_without_source_is_empty(folder: Path) -> None:
    mood = task(folder)
    assert (mood.splits, len(mood.validation), mood.majority()) == (("train",), 0, None)
    with pytest.raises(DataError, match="split 'valid' is unknown; did you mean 'validation'"):
        mood.examples("valid")


def test_one_spec_over_a_folder(folder: Path) -> None:
    here = str(folder)
    mood = Task.load(SPEC | {"train": here, "validation": here, "test": here})
    assert mood.check() == {"train": 30, "validation": 3, "test": 1}


def test_validation_is_carved_from_train_and_never_from_test(folder: Path) -> None:
    mood = task(folder, test="test.jsonl", split={"validation": 0.1, "seed": 3})
    assert mood.check() == {"train": 27, "validation": 3, "test": 1}
    assert not {e.input for e in mood.train} & {e.input for e in mood.validation}
    assert {e.source.split(":")[0] for e in mood.validation} == {"train.jsonl"}
    assert task(folder, split={"seed": 3, "validation": 0.1}).validation == mood.validation


def test_shots_limit_and_demonstrations(folder: Path) -> None:
    mood = task(folder, test="test.jsonl", shots=4, demonstrations=2)
    assert Counter(e.target for e in mood.train) == {"bad": 4, "good": 4}
    assert mood.test[0].input.count("\n\n") == 2
    assert mood.test[0].input.endswith("test 0")
    assert task(folder, validation="validation.jsonl", limit=2).check() == {"train": 2, "validation": 2}


def test_bad_records_are_listed_with_their_lines(folder: Path) -> None:
    (folder / "train.jsonl").write_text('{"text": "a", "label": 2}\n{"txt": "b", "label": 1}\n{\n')
    with pytest.raises(DataError) as caught:
        _ = task(folder).train
    first, *rest = str(caught.value).splitlines()
    assert first == "3 problems in the data:"
    assert rest[0].startswith("  train.jsonl:1: field 'label' holds 2, which is no label")
    assert rest[1].startswith("  train.jsonl:2: no field 'text'; did you mean 'txt'?")
    assert rest[2].startswith("  train.jsonl:3: broken JSON")


def test_a_bad_spec_is_refused_before_any_file_is_opened() -> None:
    with pytest.raises(RecipeError, match="task kind: 'chats' is unknown; did you mean 'chat'"):
        Task.load({"name": "t", "kind": "chats", "train": "nowhere.jsonl"})


def test_the_hash_follows_the_examples_and_not_their_place(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "other.jsonl").write_bytes((folder / "train.jsonl").read_bytes())
    first = task(folder).data_hash
    assert Task.load(SPEC | {"train": "other.jsonl"}, base=tmp_path / "moved").data_hash == first
    assert task(folder, input="{text}!").data_hash != first
    assert task(folder, shots=4).data_hash != first
    assert task(folder, validation="validation.jsonl").data_hash != first


def test_what_is_hashed_of_an_example_stays_what_it_was_when_records_were_made() -> None:
    """A new field is hashed; an empty group and the source are not, and a chat's turns are plain values."""
    plain = Example("in", "yes", ("no", "yes"), 1, ("yes",), source="a.jsonl:1")
    whole = {
        "input": "in",
        "target": "yes",
        "choices": ("no", "yes"),
        "choice": 1,
        "references": ("yes",),
        "messages": (),
    }
    assert plain.canonical() == whole
    assert replace(plain, group="q").canonical() == whole | {"group": "q"}
    chat = Example("", "", messages=(Message("user", "hi"), Message("assistant", "ho")))
    assert chat.canonical()["messages"] == (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
    )


def test_majority_is_the_floor(folder: Path) -> None:
    mood = task(folder, validation="validation.jsonl", test="test.jsonl", shots=4)
    assert mood.majority() == pytest.approx(2 / 3)  # train is mostly bad, and so are 2 of 3
    assert mood.majority("test") == 0.0


def test_majority_of_multiple_choice_is_the_commonest_place(tmp_path: Path) -> None:
    rows = [{"q": f"{i}", "o": ["x", "y"], "label": 1} for i in range(2)] + [
        {"q": "2", "o": ["x", "y"], "label": 0}
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = {"name": "c", "kind": "multiple_choice", "input": "{q}", "choices": "o", "train": "a.jsonl"}
    assert Task.load(spec, base=tmp_path).majority("train") == pytest.approx(2 / 3)


def test_a_stream_is_shuffled_by_seed_and_epoch(folder: Path) -> None:
    streamed = task(folder, streaming=True, validation="validation.jsonl", limit=2)
    first = [e.input for e in streamed.stream(seed=0, buffer=5)]
    assert sorted(first) == sorted(f"train {i}" for i in range(30))
    assert first == [e.input for e in streamed.stream(seed=0, buffer=5)]
    assert first != [e.input for e in streamed.stream(seed=0, epoch=1, buffer=5)]
    assert streamed.check() == {"validation": 2}
    assert streamed.data_hash == streamed.data_hash
    with pytest.raises(DataError, match=r"task 'mood' streams its train: iterate over task\.stream"):
        _ = streamed.train


def test_a_task_in_memory_streams_too(folder: Path) -> None:
    mood = task(folder)
    assert Counter(mood.stream(seed=0)) == Counter(mood.train)


def test_bad_data_in_a_stream_raises_at_once(folder: Path) -> None:
    (folder / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "", "label": 0}\n{\n')
    streamed = task(folder, streaming=True)
    with pytest.raises(DataError, match=r"^train\.jsonl:2: the input is empty \(field 'text'\)"):
        list(streamed.stream(seed=0, buffer=1))


@pytest.mark.parametrize("name", builtin_names())
def test_every_built_in_task_loads(name: str) -> None:
    mood = builtin(name)
    assert mood.name == name
    assert set(mood.check()) == {"train", "validation", "test"}
    assert mood.spec.description


def test_a_built_in_task_can_be_changed() -> None:
    reviews = builtin("reviews", shots=2)
    assert len(reviews.train) == 2 * len(reviews.labels)
    with pytest.raises(DataError, match="no built-in task 'review'; did you mean 'reviews'"):
        builtin("review")
    with pytest.raises(DataError, match="a task has no key 'shot'; did you mean 'shots'"):
        builtin("reviews", shot=2)


def test_a_built_in_task_takes_a_name_and_data_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"text": "fine", "label": "positive"}\n' * 2)
    mine = builtin("reviews", base=tmp_path, name="mine", test="mine.jsonl")
    assert (mine.name, len(mine.test), mine.test[0].target) == ("mine", 2, "good")
    assert mine.train[0] == builtin("reviews").train[0]


def test_tasks_are_read_without_torch() -> None:
    program = (
        "import sys; from incipit.tasks.task import builtin; builtin('reviews').check(); "
        "print('torch' in sys.modules)"
    )
    source = Path(incipit.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=source)
    assert done.stdout.strip() == "False", done.stderr
