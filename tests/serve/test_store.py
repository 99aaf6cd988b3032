"""The prompt store: names, versions, aliases; loaded once, held while read; what is broken harms nobody else."""

import json
import pickle
import random
import shutil
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.serve.simulated import Clock, run
from tests.serve.standing import backbone, soft

from incipit import artifact, files
from incipit.artifact import CARD, TENSORS
from incipit.errors import ArtifactError, AskError, IncipitError, StorageError, UnknownPrompt
from incipit.serve.asks import AnyStore, Ask, Sampling
from incipit.serve.check import executor
from incipit.serve.core import Core
from incipit.serve.store import Store

FORM = {"kind": "classification", "name": "mood", "input": "{text}", "words": ["good", "bad"]}


def put(place: Path, name: str, seed: int = 0, on: str = "llama") -> Path:
    b = backbone(on)
    artifact.save(place, prompt=soft(b, 3, seed), backbone=b, name=name, task=FORM)
    return place


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for seed, name in enumerate(("mood", "topic")):
        put(tmp_path / "library" / name, name, seed)
    return tmp_path / "library"


def uploaded(folder: Path) -> dict[str, bytes]:
    return {n: files.read_bytes(folder / n) for n in (CARD, TENSORS)}


def test_names_versions_and_aliases(library: Path, tmp_path: Path) -> None:
    store: AnyStore = Store(library, backbone("llama"))
    assert [(e.name, e.current, e.refused) for e in store.listing()] == [
        ("mood", True, ""),
        ("topic", True, ""),
    ]
    mood, _ = store.listing()
    assert mood.card["words"] == ("good", "bad") and mood.card["length"] == 3
    with store.pin("mood") as pin:
        assert (pin.name, pin.id, pin.length, pin.form) == ("mood", mood.id, 3, FORM)
    assert store.card("topic")["name"] == "topic"
    second = store.add(uploaded(put(tmp_path / "new", "mood", 7)))
    assert second.current and second.id != mood.id
    assert [e.current for e in store.listing() if e.name == "mood"].count(True) == 1
    assert store.alias("live", f"mood@{mood.id[:8]}").aliases == ("live",)
    ids = [store.pin(name).id for name in ("mood", f"mood@{mood.id[:12]}", f"mood@{mood.id}", "live")]
    assert ids == [second.id, mood.id, mood.id, mood.id]
    store.alias("live", "mood")
    again = Store(library, backbone("llama"))
    assert again.pin("live").id == again.pin("mood").id == second.id, "kept on disk"
    assert store.add(uploaded(tmp_path / "new")).id == second.id and len(store.listing()) == 3
    with pytest.raises(AskError, match=r"alias 'live' means mood@"):
        store.delete("mood")
    store.unalias("live")
    assert store.delete(f"mood@{second.id[:9]}") == 1 and store.pin("mood").id == mood.id
    assert store.delete("mood") == 1 and not (library / "mood").exists() and (library / "topic").exists()
    for call in (lambda: store.pin("mood"), lambda: store.unalias("live"), lambda: store.card("toppic")):
        with pytest.raises(UnknownPrompt):
            call()


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda s: s.pin("topik"), UnknownPrompt, "did you mean 'topic'"),
        (lambda s: s.pin("mood@12345678"), UnknownPrompt, "0 versions that begin with"),
        (lambda s: s.pin("mood@1"), UnknownPrompt, "there is no prompt"),
        (lambda s: s.pin("x" * 10_000), UnknownPrompt, "there is no prompt 'xxx"),
        (lambda s: s.alias("topic", "mood"), AskError, "is the name of a prompt"),
        (lambda s: s.alias("../up", "mood"), AskError, "is no name here"),
        (lambda s: s.alias("a b", "mood"), AskError, "is no name here"),
        (lambda s: s.add({"prompt.pt": b""}), ArtifactError, "pickles and other files are never read"),
        (lambda s: s.add({}), ArtifactError, "not found there"),
        (lambda s: s.add({"../x": b""}), ArtifactError, r"'../x': an artifact is card.json"),
    ],
)
def test_what_is_asked_wrongly_is_refused(
    library: Path, call: Callable[[Store], object], kind: type[IncipitError], said: str
) -> None:
    store = Store(library, backbone("llama"))
    before = store.listing()
    with pytest.raises(kind, match=said):
        call(store)
    assert store.listing() == before and not (library / "store.json").exists()


def _card(folder: Path, **changes: object) -> None:
    card = files.read_json(folder / CARD)
    files.write_json(folder / CARD, {**card, **changes})


def _tensors(folder: Path, **tensors: torch.Tensor) -> None:
    files.save_tensors(folder / TENSORS, tensors)
    _card(folder, tensors={n: files.sha256_tensor(t) for n, t in tensors.items()})


def _nested(folder: Path) -> None:
    """A card whose prompt wraps 600 others: JSON yet, and more than is worth a look."""
    text = json.dumps(files.read_json(folder / CARD) | {"prompt": 0})
    deep = '{"inner": ' * 600 + "{}" + "}" * 600
    files.atomic_write(folder / CARD, text.replace('"prompt": 0', f'"prompt": {deep}'))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: files.truncate(f / TENSORS, 100), "truncated or not a safetensors"),
    "nan": (lambda f: _tensors(f, soft=torch.full((3, 32), torch.nan)), "NaN or infinite"),
    "pickle": (lambda f: files.atomic_write(f / TENSORS, pickle.dumps({"a": 1})), "not a safetensors"),
    "endless header": (
        lambda f: files.atomic_write(f / TENSORS, struct.pack("<Q", 2**62) + b"{}"),
        "not a safetensors",
    ),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "prompt.safetensors not found"),
    "no card": (lambda f: (f / CARD).unlink(), "card.json not found"),
    "half a card": (lambda f: files.truncate(f / CARD, 100), "is not valid JSON"),
    "deep card": (lambda f: files.atomic_write(f / CARD, "[" * 100_000), "is not valid JSON"),
    "a list": (lambda f: files.atomic_write(f / CARD, "[]"), "names no schema"),
    "deep prompt": (_nested, "describes nothing that can be served \\(RecursionError"),
    "other tensors": (lambda f: _tensors(f, soft=torch.zeros(5, 32)), "do not fit the card"),
    "other names": (lambda f: _tensors(f, hard=torch.zeros(3, 32)), "do not fit the card"),
    "changed tensors": (
        lambda f: files.save_tensors(f / TENSORS, {"soft": torch.zeros(3, 32)}),
        "does not have the hash",
    ),
    "another backbone": (
        lambda f: (shutil.rmtree(f), put(f, "bad", on="gpt2")),
        "was trained on 'gpt2', this server runs 'llama'",
    ),
    "a prompt of 10^12 rows": (
        lambda f: _card(f, prompt={"kind": "inputs", "length": 10**12}),
        "it was made up",
    ),
    "no kind": (lambda f: _card(f, prompt={"length": 3}), "is not served"),
    "a list for a prompt": (lambda f: _card(f, prompt={"kind": []}), "is not served"),
    "no fingerprint": (
        lambda f: _card(f, backbone={"name": "x", "hidden": 32, "fingerprint": 3}),
        "does not say on which",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_artifact_is_refused_with_the_reason_and_harms_nobody(library: Path, fault: str) -> None:
    spoil, said = FAULTS[fault]
    spoil(put(library / "bad", "bad", 5))
    store = Store(library, backbone("llama"))
    assert len(store.listing()) == 3
    for _ in range(2):
        with pytest.raises(ArtifactError, match=said):
            store.pin("bad")
    with pytest.raises(ArtifactError, match=said):
        store.card("bad")
    (bad,) = (e for e in store.listing() if e.name == "bad")
    assert said.split()[0] in bad.refused
    with pytest.raises(ArtifactError):
        store.alias("live", "bad")
    for name in ("mood", "topic"):
        store.pin(name).release()
    if (library / "bad" / CARD).exists() and (library / "bad" / TENSORS).exists():
        with pytest.raises(ArtifactError):
            store.add(uploaded(library / "bad"))
    assert store.delete("bad") == 1 and len(store.listing()) == 2


def test_a_card_that_changes_under_the_server_is_noticed(library: Path) -> None:
    store = Store(library, backbone("llama"))
    shutil.rmtree(library / "mood")
    put(library / "mood", "mood", 9)
    with pytest.raises(ArtifactError, match="was changed on disk after"):
        store.pin("mood")
    store.refresh()
    store.pin("mood").release()


def test_a_state_file_of_a_stranger_is_refused(library: Path) -> None:
    (library / "store.json").write_text('{"aliases": {"live": 3}}')
    with pytest.raises(StorageError, match="is not what a prompt store writes"):
        Store(library, backbone("llama"))
    with pytest.raises(StorageError, match="does not exist"):
        Store(library / "nowhere", backbone("llama"))


def test_a_library_on_a_bucket_is_read(library: Path) -> None:
    files.push_folder(library / "mood", "memory://served/mood", overwrite=True)
    store = Store("memory://served", backbone("llama"))
    with store.pin("mood") as pin:
        assert pin.length == 3
    with pytest.raises(AskError, match="is remote and only read"):
        store.alias("live", "mood")


def test_the_first_use_loads_once_however_many_ask(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(library, backbone("llama"))
    loads, gate, plain = [], threading.Event(), artifact.load

    def counted(place: str) -> artifact.Artifact:
        loads.append(place)
        gate.wait(60)
        return plain(place)

    monkeypatch.setattr(artifact, "load", counted)
    pins: list[object] = []
    threads = [threading.Thread(target=lambda: pins.append(store.pin("mood"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and len(pins) == 8


def test_a_load_that_fails_fails_for_all_who_wait(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(library, backbone("llama"))

    def disk(place: str) -> None:
        raise StorageError("the disk is away")

    with monkeypatch.context() as patch:
        patch.setattr(artifact, "load", disk)
        with pytest.raises(StorageError, match="the disk is away"):
            store.pin("mood")
    store.pin("mood").release()  # a disk comes back: only what is wrong with an artifact is remembered


def test_what_nobody_reads_is_dropped_beyond_the_bound(library: Path) -> None:
    store = Store(library, backbone("llama"), max_bytes=1)
    mood = store.pin("mood")
    again = mood.again()
    mood.release()
    mood.release()
    assert list(store._loaded) == [mood.id], "one pin is left"
    again.release()
    assert not store._loaded and store._bytes == 0
    store.pin("mood").release()


def test_an_alias_is_swapped_under_load(library: Path, tmp_path: Path) -> None:
    """Each answer is wholly from one version, and none fails."""
    b = backbone("llama")
    store = Store(library, b)
    made = Core(executor(b, rows=4, room=32)[0], Clock(), b.decode)
    first, second = store.pin("mood").id, store.pin("topic").id
    ids = tuple(b.frequent_ids(6))
    expected = {}
    for name in ("mood", "topic"):
        with store.pin(name) as pin:
            ticket = made.submit(Ask(ids, pin, Sampling(6)))
        run(made)
        expected[pin.id] = ticket.tokens
    assert expected[first] != expected[second]
    source, tickets = random.Random(0), []
    store.alias("live", "mood")
    for _ in range(60):
        if source.random() < 0.3:
            store.alias("live", source.choice(["mood", "topic"]))
        with store.pin("live") as pin:
            tickets.append(made.submit(Ask(ids, pin, Sampling(6))))
        made.turn()
    run(made)
    seen = {t.ask.version.id for t in tickets if t.ask.version is not None}
    assert seen == {first, second}
    for ticket in tickets:
        assert ticket.ask.version is not None and ticket.wait(0).reason == "length"
        assert ticket.tokens == expected[ticket.ask.version.id]


def test_a_deleted_prompt_goes_on_where_it_runs(library: Path) -> None:
    b = backbone("llama")
    store = Store(library, b)
    made = Core(executor(b, rows=2, room=32)[0], Clock(), b.decode)
    with store.pin("mood") as pin:
        ticket = made.submit(Ask(tuple(b.frequent_ids(3)), pin, Sampling(6)))
    made.turn()
    store.delete("mood")
    run(made)
    assert ticket.wait(0).reason == "length"


def test_thousands_of_prompts_cost_little(library: Path) -> None:
    """A fifth of what 10,000 may cost: 100 MB of index and 5 s of start."""
    card = files.read_json(library / "mood" / CARD)
    tensors = files.read_bytes(library / "mood" / TENSORS)
    for i in range(2000):
        folder = library / f"p{i}"
        folder.mkdir()
        (folder / CARD).write_text(json.dumps({**card, "name": f"prompt-{i}"}))
        (folder / TENSORS).write_bytes(tensors)
    backbone("llama").fingerprint  # noqa: B018 (computed once, whatever the library holds)
    tracemalloc.start()
    store = Store(library, backbone("llama"))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    begun = time.process_time()
    store.refresh()
    spent = time.process_time() - begun
    assert len(store.listing()) == 2002
    assert kept < 100e6 / 5 and spent < 5  # seconds of this process; 0.2 where this was written
    store.pin("prompt-1999").release()
