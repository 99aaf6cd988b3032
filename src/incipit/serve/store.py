"""The prompt store: a library folder of artifacts by name, version and alias; loaded on first use, held while read.

A version is the sha256 of its card, which names the hash of every tensor: equal content is one version, wherever it
lies. An ensemble is a version too: ensemble.json names the hash of each member, and these are prompts of the library.
Which version a name means, and all aliases, stand in `store.json` beside the artifacts, written atomically. A
library that fsspec addresses (s3://, hf://) is read only.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from incipit import artifact, ensemble, files
from incipit.artifact import CARD, README, TENSORS, Artifact
from incipit.backbones import Backbone
from incipit.errors import ArtifactError, AskError, IncipitError, StorageError, UnknownPrompt, nearest
from incipit.serve.asks import Listed
from incipit.serve.index import Index, digest, read_state, short_card, short_ensemble, unknown, write_state
from incipit.serve.versions import Loaded, Pin, ensemble_of, prompt_of

MAX_BYTES = 2**28
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TAKEN = {CARD: (CARD, TENSORS, README), ensemble.CARD: (ensemble.CARD, ensemble.TENSORS, README)}
_OURS = sorted({name for names in _TAKEN.values() for name in names})  # files that go with a version


class Store:
    """The artifacts at or below `place` that one backbone serves. max_bytes: tensors kept for later use.

    `_changes` lets the library be changed by one at a time. `_lock` guards what is in memory, and is never held while a
    disk works: the engine and the event loop take it to let a version go.
    Raises StorageError when the place cannot be read at all; a broken artifact is listed with its reason.
    """

    def __init__(self, place: files.PathLike, backbone: Backbone, max_bytes: int = MAX_BYTES) -> None:
        self.place, self.backbone, self.max_bytes = str(place), backbone, max_bytes
        self._changes, self._lock = threading.Lock(), threading.RLock()
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()  # the least recently used first
        self._under_way: dict[str, Future[Loaded]] = {}
        self._bytes = 0
        self._index = Index()
        self.refresh()

    # -- names -----------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read all cards again."""
        with self._changes:
            found = Index.read(self.place, self.backbone)
            found.restore(read_state(self.place))
            with self._lock:
                self._index = found

    def listing(self) -> Sequence[Listed]:
        """Every version, sorted by name."""
        with self._lock:
            return self._index.listing()

    def listed(self, name: str) -> Listed:
        """What a name means now, with its aliases."""
        entry = self._sound(name)
        with self._lock:
            return self._index.listed(entry.id) if entry.id in self._index.entries else entry

    def card(self, name: str) -> Mapping[str, Any]:
        """The whole card of what a name means now."""
        return self._card(self._sound(name))

    def _find(self, name: str) -> Listed:
        """What a name means now. Raises UnknownPrompt, whose hint is looked for after the lock."""
        with self._lock:
            entry = self._index.find(name)
            known = [*self._index.names, *self._index.aliases] if entry is None else []
        if entry is None:
            raise unknown(name, known)
        return entry

    def _sound(self, name: str) -> Listed:
        """The same, ArtifactError where it is known to be broken."""
        entry = self._find(name)
        if entry.refused:
            raise ArtifactError(entry.refused)
        return entry

    def _card(self, entry: Listed) -> dict[str, Any]:
        data = self._data(entry)
        if digest(data) != entry.id:
            raise ArtifactError(
                f"prompt {entry.name!r} was changed on disk after the server had read its card; upload it again, or "
                "have the library read again"
            )
        several = "members" in entry.card
        return ensemble.parse_card(data, entry.place) if several else artifact.parse_card(data, entry.place)

    def _data(self, entry: Listed) -> bytes:
        """The card as it lies on the disk now."""
        return files.content(
            f"{entry.place.rstrip('/')}/{ensemble.CARD if 'members' in entry.card else CARD}"
        )

    def alias(self, alias: str, target: str) -> Listed:
        """Make `alias` mean the version that `target` means now."""
        with self._changes:
            self._writable()
            _check_name(alias, AskError)
            entry = self._sound(target)
            if alias in self._index.names:
                raise AskError(f"{alias!r} is the name of a prompt: choose another alias")
            write_state(self.place, {**self._index.aliases, alias: entry.id}, self._index.current)
            with self._lock:
                self._index.aliases[alias] = entry.id
                return self._index.listed(entry.id)

    def unalias(self, alias: str) -> None:
        """Forget an alias."""
        with self._changes:
            self._writable()
            if alias not in self._index.aliases:
                raise UnknownPrompt(f"there is no alias {alias!r}{nearest(alias, self._index.aliases)}")
            kept = {a: i for a, i in self._index.aliases.items() if a != alias}
            write_state(self.place, kept, self._index.current)
            with self._lock:
                self._index.aliases = kept

    # -- adding and deleting ---------------------------------------------------------------------------------------

    def add(self, uploaded: Mapping[str, bytes], name: str = "") -> Listed:
        """Write an uploaded artifact into the library, once it has been read, checked and built."""
        self._writable()
        kind = ensemble.CARD if ensemble.CARD in uploaded else CARD
        strangers = sorted(set(uploaded) - set(_TAKEN[kind]))
        if strangers:
            raise ArtifactError(
                f"{', '.join(map(repr, strangers))}: an artifact is {CARD} and {TENSORS}, an ensemble {ensemble.CARD} "
                f"and {ensemble.TENSORS}; pickles and other files are never read"
            )
        with files.scratch_folder(uploaded) as folder:
            read, short = self._uploaded(folder, uploaded, kind)
            _check_name(read.name, ArtifactError)
            if name and name != read.name:
                raise ArtifactError(
                    f"the card says {read.name!r}, the request {name!r}: upload it under its own, then set an alias"
                )
            with self._changes:
                return self._put(folder, uploaded, Listed(read.name, digest(uploaded[kind]), "", card=short))

    def _put(self, folder: Path, given: Mapping[str, bytes], new: Listed) -> Listed:
        """Write a version that was checked, unless it is there, and make it current for its name."""
        if new.name in self._index.aliases:
            raise ArtifactError(f"{new.name!r} is an alias here: delete that first")
        entry = self._index.entries.get(new.id)
        if entry is None or entry.refused:
            entry = replace(new, place=self._written(folder, given, new, entry))
        current = {**self._index.current, new.name: new.id}
        write_state(self.place, self._index.aliases, current)
        with self._lock:
            self._index.put(entry)
            self._index.current = current
            return self._index.listed(new.id)

    def _written(self, folder: Path, given: Mapping[str, bytes], new: Listed, torn: Listed | None) -> str:
        """Where an upload lies now: where it was damaged, or in a folder of its own."""
        if torn is not None and self._unchanged(torn):  # the same card: what stood beside it is mended
            for name, data in given.items():
                files.atomic_write(f"{torn.place}/{name}", data)
            return torn.place
        target = f"{self.place.rstrip('/')}/{new.name}/{new.id[:16]}"
        files.copy_folder(folder, target)
        return target

    def _unchanged(self, entry: Listed) -> bool:
        """Whether its card is still the one that was read."""
        try:
            return digest(self._data(entry)) == entry.id
        except StorageError:
            return False

    def _uploaded(self, folder: Path, given: Mapping[str, bytes], kind: str) -> tuple[Loaded, dict[str, Any]]:
        """What was uploaded, built as it will be when it is asked for; and its line in a listing."""
        if kind == CARD:
            read = artifact.load(folder)
            return prompt_of(replace(read, place="the upload"), self.backbone), short_card(read.card)
        card = ensemble.parse_card(given[kind], "the upload")
        if differs := artifact.differences(card["backbone"], self.backbone):
            raise ArtifactError(f"ensemble {card['name']!r} is of another backbone: {'; '.join(differs)}")
        return self._ensemble(str(folder), card), short_ensemble(card)

    def delete(self, name: str) -> int:
        """Forget a name or a version of it, and remove its files; what runs keeps what it has in memory."""
        with self._changes:
            self._writable()
            index = self._index
            if name in index.aliases:
                raise AskError(f"{name!r} is an alias: forget it as such, or delete the prompt that it means")
            gone = index.versions(name) if name in index.names else [self._find(name)]
            for entry in gone:
                told = sorted(a for a, i in index.aliases.items() if i == entry.id)
                if told:
                    raise AskError(
                        f"alias {told[0]!r} means {entry.name}@{entry.id[:12]}: move or forget it first"
                    )
            self._check_needs(gone)
            keys = {entry.id for entry in gone}
            write_state(self.place, index.aliases, {n: i for n, i in index.current.items() if i not in keys})
            with self._lock:
                for key in keys:
                    index.drop(key)
            for entry in gone:
                files.remove_files(entry.place, _OURS, self.place)
            return len(gone)

    def _check_needs(self, gone: Sequence[Listed]) -> None:
        """AskError where an ensemble that stays is made of one of these."""
        keys = {entry.id for entry in gone}
        whole = [e for e in self._index.entries.values() if "needs" in e.card and e.id not in keys]
        for entry in gone if whole else ():
            own = self._digest(entry) if "members" not in entry.card else ""
            for other in whole:
                if own and own in other.card["needs"]:
                    raise AskError(
                        f"ensemble {other.name!r} is made of {entry.name}@{entry.id[:12]}: delete that first"
                    )

    # -- loading ---------------------------------------------------------------------------------------------------

    def pin(self, name: str) -> Pin:
        """Hold the version that a name means now; read from disk by the first who asks, the others wait for it."""
        entry = self._sound(name)
        with self._lock:
            loaded = self._loaded.get(entry.id)
            if loaded is not None:
                self._loaded.move_to_end(entry.id)
                return Pin(loaded, self._count)
            future = self._under_way.get(entry.id)
            mine = future is None
            if future is None:
                future = self._under_way[entry.id] = Future()
        if mine:
            self._load(entry, future)
        loaded = future.result()
        with self._lock:
            if entry.id not in self._loaded:  # dropped again meanwhile
                self._loaded[entry.id] = loaded
                self._bytes += loaded.bytes
            return Pin(self._loaded[entry.id], self._count)

    def _load(self, entry: Listed, future: Future[Loaded]) -> None:
        """Fill a future with a version, or with why it cannot be had."""
        try:
            loaded = self._read(entry)
        except BaseException as error:
            with self._lock:
                del self._under_way[entry.id]
                if isinstance(error, ArtifactError):
                    self._index.refuse(entry.id, str(error))
            future.set_exception(error)
            return
        with self._lock:
            self._loaded[entry.id] = loaded
            self._bytes += loaded.bytes
            del self._under_way[entry.id]
        future.set_result(loaded)

    def _read(self, entry: Listed) -> Loaded:
        """What an entry names, read and built."""
        card = self._card(entry)
        if "members" not in entry.card:
            return prompt_of(artifact.load(entry.place), self.backbone, entry.id)
        return self._ensemble(entry.place, card, entry.id)

    def _ensemble(self, place: str, card: Mapping[str, Any], key: str = "") -> Loaded:
        """An ensemble whose members are prompts of this library, where its card says or elsewhere by their hash."""
        ids: list[str] = []

        def find(where: str, sha256: str) -> Artifact | None:
            with self._lock:
                prompts = [e for e in self._index.entries.values() if "members" not in e.card]
            there = [e for e in prompts if os.path.normpath(e.place) == where]
            others = (e for e in prompts if not e.refused and self._digest(e) == sha256)
            found = next((e for e in there if self._digest(e) == sha256), None) or next(others, None)
            found = found or (there[0] if there else None)
            if found is None:
                return None
            ids.append(found.id)
            return artifact.load(found.place)

        return ensemble_of(ensemble.assembled(place, card, find), self.backbone, ids, key)

    def _digest(self, entry: Listed) -> str:
        """What a prompt's card says that it computes; "" of one that cannot be read."""
        try:
            return artifact.digest_of(self._card(entry))
        except IncipitError:
            return ""

    def _count(self, loaded: Loaded, more: int) -> None:
        """One pin more (1) or fewer (-1); what nobody reads is dropped, the oldest first, down to max_bytes."""
        with self._lock:
            loaded.pins += more
            if self._bytes <= self.max_bytes:
                return
            for key in [key for key, one in self._loaded.items() if not one.pins]:
                self._bytes -= self._loaded.pop(key).bytes
                if self._bytes <= self.max_bytes:
                    return

    def _writable(self) -> None:
        if files.is_remote(self.place):
            raise AskError(f"the library {self.place!r} is remote and only read: change it where it is kept")


def _check_name(name: str, kind: type[IncipitError]) -> None:
    if not _NAME.fullmatch(name):
        raise kind(
            f"{name[:120]!r} is no name here: use letters, digits, '.', '_' and '-', at most 100 of them"
        )
