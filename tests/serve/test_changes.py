"""The library is changed while it serves: nobody else waits, nothing else goes, and what was damaged is mended."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.ensemble.conftest import FORM as MOODS
from tests.ensemble.conftest import made_prompt
from tests.serve.standing import backbone
from tests.serve.test_store import put, uploaded

from incipit import artifact, files
from incipit.artifact import CARD, TENSORS
from incipit.errors import ArtifactError, StorageError, UnknownPrompt
from incipit.serve import index
from incipit.serve.store import Store

PATIENCE = 60  # seconds after which a test has failed


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for seed, name in enumerate(("mood", "topic")):
        put(tmp_path / "library" / name, name, seed)
    return tmp_path / "library"


@pytest.fixture
def store(library: Path) -> Store:
    return Store(library, backbone("llama"))


class Held:
    """A function in whose place it is waits at its beginning, until the block ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.came, self._go, self._plain = threading.Event(), threading.Event(), getattr(owner, name)
        monkeypatch.setattr(owner, name, self._waits)

    def _waits(self, *arguments: Any) -> Any:
        self.came.set()
        assert self._go.wait(PATIENCE)
        return self._plain(*arguments)

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *_: object) -> None:
        self._go.set()


def others_go_on(store: Store, held: Held, slow: Callable[[], object]) -> None:
    """While `slow` is held, a version is let go, pinned and listed."""
    mood = store.pin("mood")
    through = threading.Event()

    def go_on() -> None:
        mood.release()
        with store.pin("mood") as pin:
            pin.again().release()
        assert len(store.listing()) == 2
        through.set()

    threads = [threading.Thread(target=slow), threading.Thread(target=go_on)]
    with held:
        threads[0].start()
        assert held.came.wait(PATIENCE)
        threads[1].start()
        passed = through.wait(PATIENCE)
    for thread in threads:
        thread.join(PATIENCE)
    assert passed, "it waited for a disk, or for somebody's wrong name"


CHANGES: dict[str, Callable[[Store, Path], object]] = {
    "alias": lambda store, _: store.alias("live", "topic"),
    "delete": lambda store, _: store.delete("topic"),
    "add": lambda store, new: store.add(uploaded(new)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_slow_disk_holds_up_nobody_who_runs(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The engine lets versions go between two steps: were it to wait, every request would."""
    new = put(tmp_path / "new", "new", 3)
    others_go_on(store, Held(monkeypatch, files, "write_json"), lambda: CHANGES[change](store, new))


def test_a_wrong_name_holds_up_nobody(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> None:
        with pytest.raises(UnknownPrompt, match="did you mean 'topic'"):
            store.pin("toppic")

    others_go_on(store, Held(monkeypatch, index, "nearest"), asked)


def test_of_very_many_names_those_that_begin_alike_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = index.nearest
    monkeypatch.setattr(index, "nearest", lambda word, known: seen.append(len(known)) or plain(word, known))
    names = [f"prompt-{i}" for i in range(10_000)]
    assert str(index.unknown("prompt-77x", names)) == (
        "there is no prompt 'prompt-77x'; did you mean 'prompt-77'?"
    )
    assert seen == [index.LIKE]


def test_many_uploads_of_one_name_at_once(store: Store, library: Path, tmp_path: Path) -> None:
    new = [uploaded(put(tmp_path / str(seed), "mood", seed)) for seed in range(10, 16)]
    listed: list[Any] = []
    threads = [threading.Thread(target=lambda n=n: listed.append(store.add(n))) for n in new]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len({one.id for one in listed}) == 6 and len(store.listing()) == 8
    again = Store(library, backbone("llama"))
    assert again.pin("mood").id == store.pin("mood").id
    here, there = (sorted(one.listing(), key=lambda e: e.id) for one in (store, again))
    assert here == there


# -- deleting --------------------------------------------------------------------------------------------------


def test_a_version_that_lies_below_another_stays(store: Store, library: Path, tmp_path: Path) -> None:
    first = store.pin("mood").id
    second = store.add(uploaded(put(tmp_path / "new", "mood", 7)))
    assert Path(second.place).parent == library / "mood"
    assert store.delete(f"mood@{first}") == 1
    again = Store(library, backbone("llama"))
    assert [e.id for e in again.listing() if e.name == "mood"] == [second.id]
    again.pin("mood").release()
    assert again.delete("mood") == 1 and not (library / "mood").exists()
    assert (library / "topic").exists()


def test_a_library_that_is_an_artifact_itself_stays(tmp_path: Path) -> None:
    place = put(tmp_path / "library", "mood")
    put(place / "topic", "topic", 1)
    store = Store(place, backbone("llama"))
    store.alias("live", "topic")
    assert store.delete("mood") == 1
    again = Store(place, backbone("llama"))
    assert [e.name for e in again.listing()] == ["topic"] and again.pin("live").name == "topic"
    again.unalias("live")
    assert again.delete("topic") == 1 and Store(place, backbone("llama")).listing() == []


def test_what_is_no_part_of_a_prompt_stays(store: Store, library: Path) -> None:
    (library / "mood" / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    store.delete("mood")
    assert [f.name for f in (library / "mood").iterdir()] == ["metrics.jsonl"]
    assert [e.name for e in Store(library, backbone("llama")).listing()] == ["topic"]


# -- what cannot be kept, and what was damaged -------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_cannot_be_kept_changes_nothing(
    store: Store, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    new, before = put(tmp_path / "new", "topic", 3), store.listing()

    def full(*_: object) -> None:
        raise StorageError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", full)
        with pytest.raises(StorageError, match="no space"):
            CHANGES[change](store, new)
    assert store.listing() == before
    for entry in before:
        with store.pin(entry.name) as pin:
            assert pin.id == entry.id


def test_the_same_upload_mends_what_was_damaged(store: Store, library: Path) -> None:
    whole = uploaded(library / "mood")
    files.truncate(library / "mood" / TENSORS, 100)
    with pytest.raises(ArtifactError, match="truncated"):
        store.pin("mood")
    listed = store.add(whole)
    assert listed.refused == "" and Path(listed.place) == library / "mood"
    for one in (store, Store(library, backbone("llama"))):
        one.pin("mood").release()
        assert len(one.listing()) == 2


def test_an_upload_leaves_what_has_come_into_its_place(store: Store, library: Path) -> None:
    whole = uploaded(library / "mood")
    shutil.rmtree(library / "mood")
    put(library / "mood", "mood", 9)
    with pytest.raises(ArtifactError, match="was changed on disk"):
        store.pin("mood")
    listed = store.add(whole)
    assert listed.refused == "" and Path(listed.place).parent == library / "mood"
    with store.pin("mood") as pin:
        assert pin.id == listed.id
    again = Store(library, backbone("llama"))
    assert len([e for e in again.listing() if e.name == "mood"]) == 2 and again.pin("mood").id == listed.id


def test_a_read_out_of_other_classes_than_words(tmp_path: Path) -> None:
    b = backbone("bert")
    prompt = made_prompt(b, 0, 4, ("good", "bad"))
    artifact.save(tmp_path / "mood", prompt=prompt, backbone=b, name="mood", task=MOODS)
    with pytest.raises(ArtifactError, match="its read-out has 2 classes, its card 3 label words"):
        Store(tmp_path, b).pin("mood")


# -- where a library may lie -----------------------------------------------------------------------------------


def test_a_library_that_is_no_folder(library: Path) -> None:
    with pytest.raises(StorageError, match="is no folder; name one below which"):
        Store(library / "mood" / CARD, backbone("llama"))


def test_what_a_writer_has_not_finished_is_no_artifact(library: Path, tmp_path: Path) -> None:
    place = tmp_path / "disk.part1" / "library"
    shutil.copytree(library, place)
    for aside in (".mood.x1.part", ".mood.x1.old/old"):
        put(place / aside, "mood", 5)
    assert [e.name for e in Store(place, backbone("llama")).listing()] == ["mood", "topic"]
