"""A library lists what is whole, and says of the rest what is wrong."""

from pathlib import Path

import pytest

from incipit import artifact, files, library
from incipit.backbones import Backbone, tiny, wrap
from incipit.errors import ArtifactError, StorageError
from incipit.prompts import InputPrompt


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return wrap("tiny", *tiny.build("llama"))


def put(place: files.PathLike, name: str, backbone: Backbone) -> None:
    prompt = InputPrompt(backbone.geometry, 2)
    artifact.save(place, prompt=prompt, backbone=backbone, name=name, task={"name": "t", "kind": "text"})


def test_entries_and_find(tmp_path: Path, backbone: Backbone) -> None:
    put(tmp_path / "b" / "deep", "second", backbone)
    put(tmp_path / "a", "first", backbone)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("no artifact")
    found = library.entries(tmp_path)
    assert [entry.name for entry in found] == ["first", "second"]
    assert found[0].row() == {
        "name": "first", "place": str(tmp_path / "a"), "task": "t", "kind": "text", "backbone": "tiny",
        "parameters": 2 * backbone.geometry.hidden, "bytes": 8 * backbone.geometry.hidden, "scores": {},
    }  # fmt: skip
    assert library.find(tmp_path, "second").place == str(tmp_path / "b" / "deep")
    with pytest.raises(ArtifactError, match=r"holds no prompt named 'secnd'; did you mean 'second'\?"):
        library.find(tmp_path, "secnd")


def test_two_of_one_name(tmp_path: Path, backbone: Backbone) -> None:
    put(tmp_path / "a", "same", backbone)
    put(tmp_path / "b", "same", backbone)
    with pytest.raises(ArtifactError, match=r"holds 2 prompts named 'same': .*; give the folder"):
        library.find(tmp_path, "same")


def test_broken_ones_are_listed_with_their_reason(tmp_path: Path, backbone: Backbone) -> None:
    for name in ("card", "tensors", "cut", "fine"):
        put(tmp_path / name, name, backbone)
    (tmp_path / "card" / artifact.CARD).unlink()
    (tmp_path / "tensors" / artifact.TENSORS).unlink()
    whole = files.read_bytes(tmp_path / "cut" / artifact.TENSORS)
    files.atomic_write(tmp_path / "cut" / artifact.TENSORS, whole[:-1])
    reasons = {entry.name: entry.reason for entry in library.entries(tmp_path)}
    assert reasons["fine"] == ""
    assert "card.json not found" in reasons["card"]
    assert "prompt.safetensors not found" in reasons["tensors"]
    assert "truncated" in reasons["cut"]
    with pytest.raises(ArtifactError, match=r"card.json not found"):
        library.find(tmp_path, "card")


def test_a_remote_place(backbone: Backbone) -> None:
    put("memory://prompts/one", "one", backbone)
    (entry,) = library.entries("memory://prompts")
    assert (entry.name, entry.reason) == ("one", "")


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist; name a folder below which"):
        library.entries(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file' is a file; name a folder below which"):
        library.entries(tmp_path / "file")
    with pytest.raises(StorageError, match="check the address and access"):
        library.entries("nosuchprotocol://a")
