"""Backbones that a study trains itself: once, one from another, known by their recipes."""

from pathlib import Path
from typing import Any

import pytest

from incipit import files, record
from incipit.errors import RecipeError
from incipit.study import Study, grid

SILENT: Any = lambda line: None  # noqa: E731
RECIPE = """
name = "{name}"
family = "encoder-decoder"
corpus = ["corpus/train.jsonl"]
validation = ["corpus/validation.jsonl"]
vocabulary = 310
hidden = 8
layers = 1
heads = 2
ffn = 16
context = 32
positions = 256
validation_blocks = 2
stages = [[0.0, {{ {objective} = 1.0 }}]]
[fit]
steps = 2
batch = 2
eval_every = 2
best = "min"
show = false
[fit.optim]
name = "adamw"
lr = 0.001
"""


@pytest.fixture
def ladder(study: Path) -> Path:
    """The toy study on two backbones of its own, and some text."""
    path = study / "studies" / "toy" / "small.toml"
    text = files.read_bytes(path).decode()
    for before, after in (
        ('one = { name = "t5", parameters = 1000 }', 'one = { pretrain = "span.toml", parameters = 1000 }'),
        (
            'two = { name = "t5", parameters = 2000, sentinel = "<extra_id_0>" }',
            'two = { pretrain = "lm.toml", after = "one", parameters = 2000 }',
        ),
        ('method = ["prompt", "model", "few-shot"]\nshift = ["far"]\n', ""),
    ):
        assert before in text
        text = text.replace(before, after)
    files.atomic_write(path, text)
    for name, objective in (("span", "span_corruption"), ("lm", "lm_adaptation")):
        files.atomic_write(path.parent / f"{name}.toml", RECIPE.format(name=name, objective=objective))
    for split in ("train", "validation"):
        for i in range(30):
            line = f"The film number {i} was good, and the one after it was bad; nobody knows why it went so."
            files.append_jsonl(study / "texts" / f"{split}.jsonl", {"text": line * 3})
    return study


def test_each_is_trained_once_and_from_the_one_before(ladder: Path) -> None:
    said: list[str] = []
    grid.run(Study.read("toy"), "runs", only=["size"], corpus="texts", say=said.append)
    assert [line for line in said if "pre-training" in line] == [
        "one: pre-training by span.toml",
        "two: pre-training by lm.toml",
    ]
    rows = record.read(Path("runs") / grid.RECORDS)
    one, two = (
        next(r for r in rows if r["backbone"]["name"] == name)["backbone"]["fingerprint"]
        for name in ("one", "two")
    )
    assert one["tokenizer"] == two["tokenizer"] and one["weights"] != two["weights"]
    said.clear()
    again = grid.run(Study.read("toy"), "runs", only=["size"], corpus="texts", say=said.append)
    assert len(again.known) == 2 and not any("pre-training" in line for line in said)


def test_another_recipe_is_another_backbone(ladder: Path) -> None:
    before = [p.cell.key for p in Study.read("toy").places(["size"])]
    path = ladder / "studies" / "toy" / "span.toml"
    files.atomic_write(path, files.read_bytes(path).decode().replace("steps = 2", "steps = 3"))
    after = [p.cell.key for p in Study.read("toy").places(["size"])]
    assert before[0] != after[0] and before[1] != after[1]  # the second starts from the first


def test_without_a_corpus(ladder: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"span.toml trains a backbone on raw text: give the folder .*--corpus"
    ):
        grid.run(Study.read("toy"), "runs", only=["size"], say=SILENT)


def test_a_t5_begins_with_the_blocks_of_the_study_s_own_causal_model(ladder: Path) -> None:
    """`after` gives the recipe's `blocks` where it has them; two labels of one recipe share one training."""
    folder = ladder / "studies" / "toy"
    text = RECIPE.format(name="lm", objective="causal").replace("encoder-decoder", "causal")
    files.atomic_write(folder / "text.toml", text.replace("heads = 2", "heads = 2\nkv_heads = 1"))
    reading = RECIPE.format(name="reading", objective="continuation")
    files.atomic_write(folder / "span.toml", f'blocks = ""\nactivation = "silu"\n{reading}')
    table = files.read_bytes(folder / "small.toml").decode()
    table = table.replace(
        'one = { pretrain = "span.toml", parameters = 1000 }',
        'zero = { pretrain = "text.toml" }\n'
        'one = { pretrain = "span.toml", after = "zero", parameters = 1000 }\n'
        'same = { pretrain = "span.toml", after = "zero", sentinel = "<extra_id_0>" }',
    )
    files.atomic_write(folder / "small.toml", table)
    said: list[str] = []
    grid.run(Study.read("toy"), "runs", only=["size"], corpus="texts", say=said.append)
    assert [line for line in said if "pre-training" in line] == [
        "zero: pre-training by text.toml",
        "one: pre-training by span.toml",
        "two: pre-training by lm.toml",
    ]
    study = Study.read("toy")
    bench = grid._Bench(study, Path("runs"), "", "", SILENT)
    assert bench._made("same") == bench._made("one"), "no corpus is needed: it is there"
    (export,) = Path("runs/backbones").glob("span-*/export")
    assert 'blocks = "text-' in (export / "README.md").read_text(), "a card names no place of one machine"
    before = study.origin("one")
    files.atomic_write(folder / "text.toml", text.replace("steps = 2", "steps = 3"))
    assert Study.read("toy").origin("one") != before
