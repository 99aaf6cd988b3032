"""A prompt on disk: what is kept, what is checked, and what a reader is told of a damaged one."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from incipit import artifact, files
from incipit.artifact import CARD, README, TENSORS
from incipit.assemble import PromptChoice, make_prompt
from incipit.backbones import Backbone, tiny, wrap
from incipit.batch import collate
from incipit.errors import ArtifactError, StorageError
from incipit.prompts import Prompt

FORM = {
    "name": "mood",
    "kind": "classification",
    "input": "{text}",
    "words": ["red", "blue"],
    "metrics": ["accuracy"],
}


@pytest.fixture(scope="module")
def llama() -> Backbone:
    return wrap("llama", *tiny.build("llama"))


def prompt_of(backbone: Backbone, **choice: Any) -> Prompt:
    made = make_prompt(PromptChoice(length=4, **choice), backbone, ("red", "blue"))
    assert made is not None
    return made


def save(place: Path | str, backbone: Backbone, prompt: Prompt | None = None, **more: Any) -> str:
    given = {"name": "mood", "task": FORM, "scores": {"test": {"accuracy": 0.75}}} | more
    return artifact.save(place, prompt=prompt or prompt_of(backbone), backbone=backbone, **given)


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        card = json.loads((folder / CARD).read_text())
        change(card)
        (folder / CARD).write_text(json.dumps(card))

    return run


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("llama", {}),
        ("llama", {"kind": "prefix"}),
        ("llama", {"reparametrise": "mlp", "hidden": 8}),
        ("t5", {}),
        ("bert", {"readout": "head"}),
    ],
)
def test_loaded_is_saved(tmp_path: Path, name: str, choice: dict[str, Any]) -> None:
    backbone = wrap(name, *tiny.build(name))
    prompt = prompt_of(backbone, **choice)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(0.01)
    again = artifact.load(save(tmp_path / "a", backbone, prompt)).prompt(backbone)
    batch = collate([backbone.encode("red film", "blue", choice=1)])
    with torch.no_grad():
        one, other = (backbone.loss(batch, p.injection())[0] for p in (prompt, again))
    assert torch.equal(one, other)


def test_equal_prompts_give_equal_bytes(tmp_path: Path, llama: Backbone) -> None:
    for name in ("a", "b"):
        save(tmp_path / name, llama)
    for file in (TENSORS, CARD, README):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_card_says_what_it_is(tmp_path: Path, llama: Backbone) -> None:
    found = artifact.load(save(tmp_path / "a", llama))
    assert (found.name, found.words, found.size) == ("mood", ("red", "blue"), 4 * 32 * 4)
    assert found.task == FORM
    assert found.card["schema"] == 1 and found.card["parameters"] == 128
    assert found.card["backbone"] == {
        "name": "llama", "family": "causal", "hidden": 32, "fingerprint": llama.fingerprint,
    }  # fmt: skip
    page = (tmp_path / "a" / README).read_text()
    assert page.startswith("---\n") and "- test: accuracy 0.7500" in page and "label words: red, blue" in page


def test_a_remote_place(llama: Backbone) -> None:
    place = save("memory://shelf/mood", llama)
    assert artifact.load(place).name == "mood"
    with pytest.raises(StorageError, match="exists already"):
        save(place, llama)
    save(place, llama, name="other", overwrite=True)
    assert artifact.load(place).name == "other"


def test_another_backbone_is_refused_in_words(tmp_path: Path, llama: Backbone) -> None:
    found = artifact.load(save(tmp_path / "a", llama))
    other = wrap("other", *tiny.build("llama", seed=1))
    with pytest.raises(ArtifactError) as caught:
        found.prompt(other)
    assert str(caught.value) == (
        "prompt 'mood' was trained on 'llama', this is 'other': another embedding matrix; other weights; "
        "load that backbone, or train the prompt on this one"
    )
    assert found.prompt(other, force=True).length == 5
    with pytest.raises(
        ArtifactError,
        match="another configuration; another embedding matrix; other weights; another vocabulary",
    ):
        found.prompt(wrap("gpt2", *tiny.build("gpt2")))


def test_the_dtype_does_not_make_another_backbone(tmp_path: Path, llama: Backbone) -> None:
    narrow = wrap("llama", *tiny.build("llama", dtype="bfloat16"))
    assert artifact.load(save(tmp_path / "a", llama)).prompt(narrow).length == 5


DAMAGED: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: (f / TENSORS).unlink(), "is no prompt artifact: prompt.safetensors not found there"),
    (lambda f: (f / CARD).unlink(), "is no prompt artifact: card.json not found there"),
    (lambda f: os.truncate(f / TENSORS, 100), "is truncated or not a safetensors file"),
    (lambda f: (f / TENSORS).write_bytes(b""), "is truncated or not a safetensors file"),
    (lambda f: os.truncate(f / CARD, 100), "is not valid JSON"),
    (edit(lambda c: c.update(schema=2)), "written by a newer incipit (schema 2, known: 1): upgrade incipit"),
    (edit(lambda c: c.pop("schema")), "card.json names no schema"),
    (edit(lambda c: c.pop("prompt")), "card.json lacks prompt: restore it"),
    (edit(lambda c: c.update(backbone={"name": "x"})), "card.json lacks backbone.hidden, backbone.fingerprint"),
    (edit(lambda c: c.update(task=[])), "card.json lacks task"),
    (edit(lambda c: c["tensors"].update({"inner.soft": "0" * 64})), "does not have the hash that the card names"),
    (edit(lambda c: c["tensors"].clear()), "the card does not name tensor 'inner.soft'"),
    (edit(lambda c: c["tensors"].update(more="0")), "tensor 'more' does not have the hash"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), DAMAGED)
def test_a_damaged_artifact_says_how(
    tmp_path: Path, llama: Backbone, damage: Callable[[Path], object], says: str
) -> None:
    place = tmp_path / "a"
    save(place, llama)
    damage(place)
    with pytest.raises(ArtifactError) as caught:
        artifact.load(place)
    assert says in str(caught.value) and str(place) in str(caught.value)


def test_one_flipped_bit_is_found(tmp_path: Path, llama: Backbone) -> None:
    save(tmp_path / "a", llama)
    data = bytearray((tmp_path / "a" / TENSORS).read_bytes())
    data[-1] ^= 1
    (tmp_path / "a" / TENSORS).write_bytes(data)
    with pytest.raises(ArtifactError, match="does not have the hash that the card names"):
        artifact.load(tmp_path / "a")


def test_a_card_of_another_shape_is_refused(tmp_path: Path, llama: Backbone) -> None:
    save(tmp_path / "a", llama)
    edit(lambda c: c["prompt"]["inner"].update(length=5))(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"tensors inner\.soft do not fit the card"):
        artifact.load(tmp_path / "a").prompt(llama)


def test_nothing_is_overwritten_unasked(tmp_path: Path, llama: Backbone) -> None:
    save(tmp_path / "a", llama)
    with pytest.raises(StorageError, match="exists already: choose another folder or pass --overwrite"):
        save(tmp_path / "a", llama)
    save(tmp_path / "a", llama, name="new", overwrite=True)
    assert artifact.load(tmp_path / "a").name == "new"


def test_only_an_artifact_is_ever_replaced(tmp_path: Path, llama: Backbone) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(StorageError, match="exists and is no prompt artifact: choose another name or folder"):
        save(tmp_path / "thesis", llama, overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_numbers_that_are_not_finite_are_not_saved(tmp_path: Path, llama: Backbone) -> None:
    prompt = prompt_of(llama)
    with torch.no_grad():
        next(prompt.parameters())[0, 0] = torch.inf
    with pytest.raises(ArtifactError, match=r"'mood': tensor 'inner\.soft' holds NaN or infinite numbers"):
        save(tmp_path / "a", llama, prompt)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, llama: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a"
    save(place, llama)
    before = {f.name: f.read_bytes() for f in place.iterdir()}

    def full(path: object, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(StorageError, match="No space left on device; free some space and repeat"):
        save(place, llama, name="new", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert {f.name: f.read_bytes() for f in place.iterdir()} == before
