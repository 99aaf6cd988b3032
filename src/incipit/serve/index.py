"""What a library holds, from its cards alone: no tensor is read, and little is kept of each."""

from __future__ import annotations

import sys
from bisect import bisect, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from incipit import artifact, ensemble, files
from incipit.artifact import CARD, TENSORS
from incipit.backbones import Backbone
from incipit.errors import IncipitError, StorageError, UnknownPrompt, nearest
from incipit.serve.asks import Listed

STATE = "store.json"  # beside the artifacts: aliases, and which version a name means
SHORTEST = 8  # digits of an id that name a version
LIKE = 500  # names among which the one that was meant is looked for: that takes 50 microseconds each


class Index:
    """entries: id -> Listed. names: name -> ids, in order of place. current: name -> the id that it means."""

    def __init__(self) -> None:
        self.entries: dict[str, Listed] = {}
        self.names: dict[str, list[str]] = {}
        self.current: dict[str, str] = {}
        self.aliases: dict[str, str] = {}

    @staticmethod
    def read(place: str, backbone: Backbone) -> Index:
        """All artifacts at or below a place; halves and damaged cards are listed with the reason."""
        if not files.is_remote(place):
            if not files.exists(place):
                raise StorageError(
                    f"{place!r} does not exist; name a folder below which `incipit tune` wrote"
                )
            if files.folder_files(place) is None:
                raise StorageError(f"{place!r} is no folder; name one below which `incipit tune` wrote")
        try:
            cards, tensors, several = (
                set(files.list_folders(place, name)) for name in (CARD, TENSORS, ensemble.CARD)
            )
        except (OSError, ValueError, ImportError) as error:
            raise StorageError(f"listing {place!r} failed: {error}; check the address and access") from error
        index, known = Index(), dict[str, str]()
        for folder in sorted(cards | tensors):
            missing = [n for n, there in ((CARD, cards), (TENSORS, tensors)) if folder not in there]
            index.put(_entry(folder, missing, backbone, known))
        for folder in sorted(several):
            index.put(_several(folder, folder in cards | tensors, backbone, known))
        return index

    def put(self, entry: Listed) -> None:
        """Add a version; equal content that lies twice is one, and one that was refused is replaced."""
        if entry.id not in self.entries:
            self.names.setdefault(entry.name, []).append(entry.id)
        if entry.id not in self.entries or self.entries[entry.id].refused:
            self.entries[entry.id] = entry

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what store.json says, as far as it is still there."""
        self.aliases = {
            a: i for a, i in state.get("aliases", {}).items() if i in self.entries and a not in self.names
        }
        self.current = {n: i for n, i in state.get("current", {}).items() if i in self.names.get(n, ())}

    def meant(self, name: str) -> str:
        """The id that a prompt's own name means: what was set, or the last that can be served."""
        if name in self.current:
            return self.current[name]
        ids = self.names[name]
        return next((i for i in reversed(ids) if not self.entries[i].refused), ids[-1])

    def find(self, name: str) -> Listed | None:
        """What a name, an alias, or name@digits means now; None for a name that is none.

        Raises UnknownPrompt for digits that do not tell one version.
        """
        if name in self.names:
            return self.entries[self.meant(name)]
        if name in self.aliases:
            return self.entries[self.aliases[name]]
        base, _, digits = name.rpartition("@")
        if base not in self.names or len(digits) < SHORTEST:
            return None
        found = [i for i in self.names[base] if i.startswith(digits)]
        if len(found) != 1:
            raise UnknownPrompt(
                f"prompt {base!r} has {len(found)} versions that begin with {digits[:64]!r}: see the listing"
            )
        return self.entries[found[0]]

    def versions(self, name: str) -> list[Listed]:
        """All versions of a name."""
        return [self.entries[i] for i in self.names[name]]

    def listed(self, key: str, told: Mapping[str, tuple[str, ...]] | None = None) -> Listed:
        """An entry with its present aliases."""
        entry = self.entries[key]
        told = told if told is not None else self._told()
        return replace(entry, aliases=told.get(key, ()), current=self.meant(entry.name) == key)

    def listing(self) -> Sequence[Listed]:
        """Every version, sorted by name."""
        told = self._told()
        return [self.listed(i, told) for name in sorted(self.names) for i in self.names[name]]

    def _told(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, list[str]] = {}
        for alias, key in self.aliases.items():
            insort(found.setdefault(key, []), alias)
        return {key: tuple(aliases) for key, aliases in found.items()}

    def refuse(self, key: str, reason: str) -> None:
        """Remember why a version cannot be served."""
        if key in self.entries:
            self.entries[key] = replace(self.entries[key], refused=reason)

    def drop(self, key: str) -> None:
        """Forget a version."""
        name = self.entries.pop(key).name
        self.names[name].remove(key)
        if self.current.get(name) == key:
            del self.current[name]
        if not self.names[name]:
            del self.names[name]


def unknown(name: str, known: Sequence[str]) -> UnknownPrompt:
    """That no prompt goes by a name, and the nearest of those that do; of very many, of those that begin alike."""
    if len(known) > LIKE:
        known = sorted(known)
        at = bisect(known, name)
        known = known[max(0, at - LIKE // 2) : at + LIKE // 2]
    return UnknownPrompt(f"there is no prompt {name[:120]!r}{nearest(name[:120], known)}")


# -- cards -----------------------------------------------------------------------------------------------------


def _entry(folder: str, missing: Sequence[str], backbone: Backbone, known: dict[str, str]) -> Listed:
    """One folder as it is listed. known: backbone tables seen -> what is wrong with them, found once each."""

    def read() -> Listed:
        data = files.content(f"{folder.rstrip('/')}/{CARD}")
        card = artifact.parse_card(data, folder)
        refused = _elsewhere("prompt", card, backbone, known)
        return Listed(card["name"], digest(data), folder, card=short_card(card), refused=refused)

    why = f"{folder!r} is no prompt artifact: {missing[0]} not found there" if missing else ""
    return _listed(folder, "", why, read)


def _several(folder: str, both: bool, backbone: Backbone, known: dict[str, str]) -> Listed:
    """One folder of an ensemble as it is listed."""

    def read() -> Listed:
        data = files.content(f"{folder.rstrip('/')}/{ensemble.CARD}")
        card = ensemble.parse_card(data, folder)
        refused = _elsewhere("ensemble", card, backbone, known)
        return Listed(card["name"], digest(data), folder, card=short_ensemble(card), refused=refused)

    why = ""
    if files.is_remote(folder):
        why = f"{folder!r} is an ensemble on a bucket: they are read from a local library; copy it as a whole"
    elif both:
        why = f"{folder!r} holds a prompt and an ensemble: give each a folder of its own"
    return _listed(folder, f"/{ensemble.CARD}", why, read)


def _listed(folder: str, mark: str, why: str, read: Callable[[], Listed]) -> Listed:
    """What `read` gives, or the folder under its own name with the reason `why` nothing can be read there."""
    if not why:
        try:
            return read()
        except IncipitError as error:
            why = str(error)
        except Exception as error:  # a card is a stranger's: whatever it leads to is its fault
            why = f"{folder!r}: its card describes nothing that can be served ({type(error).__name__})"
    return Listed(
        folder.rstrip("/").rsplit("/", 1)[-1], digest(f"{folder}{mark}".encode()), folder, refused=why
    )


def _elsewhere(what: str, card: Mapping[str, Any], backbone: Backbone, known: dict[str, str]) -> str:
    """Why a card belongs to another backbone; ""."""
    base = repr(sorted(card["backbone"].items(), key=str))
    if base not in known:
        try:
            known[base] = "; ".join(artifact.differences(card["backbone"], backbone))
        except (AttributeError, TypeError):
            known[base] = "its card does not say on which"
    if not known[base]:
        return ""
    return (
        f"{what} {card['name']!r} was trained on {card['backbone']['name']!r}, this server runs {backbone.name!r}: "
        f"{known[base]}"
    )


def digest(card: bytes) -> str:
    """The id of a version: the sha256 of its card.json."""
    return files.sha256_bytes(card)


def short_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a listing shows, a few hundred bytes of memory; words that many cards share stand once."""
    task, prompt = card["task"], card["prompt"]
    return {
        "task": sys.intern(str(task.get("name", ""))),
        "kind": sys.intern(str(task["kind"])),
        "words": tuple(sys.intern(w) for w in words_of(task)),
        "backbone": sys.intern(str(card["backbone"]["name"])),
        "parameters": card.get("parameters", 0),
        "prompt": sys.intern(str(prompt.get("kind", ""))),
        "length": _length(prompt),
        "scores": card.get("scores", {}),
    }


def short_ensemble(card: Mapping[str, Any]) -> dict[str, Any]:
    """The same of an ensemble. needs: the hashes of its members."""
    task, rows = card["task"], card["members"]
    return {
        "task": str(task.get("name", "")),
        "kind": str(task["kind"]),
        "words": words_of(task),
        "backbone": sys.intern(str(card["backbone"]["name"])),
        "parameters": card.get("parameters", 0),
        "prompt": "ensemble",
        "length": longest(rows),
        "scores": card.get("scores", {}),
        "method": card["method"],
        "members": tuple(row["name"] for row in rows),
        "needs": tuple(row["sha256"] for row in rows),
    }


def words_of(task: Mapping[str, Any]) -> tuple[str, ...]:
    """Label words of a text form; a card may be a stranger's, so anything but a list of them counts as none."""
    words = task.get("words")
    return tuple(map(str, words)) if isinstance(words, list | tuple) else ()


def longest(rows: Sequence[Mapping[str, Any]]) -> int:
    """The length of an ensemble's longest member; 0 where the card does not say."""
    lengths = [row.get("length") for row in rows]
    return max((n for n in lengths if isinstance(n, int)), default=0)


def _length(spec: Any) -> int:
    """The length that a prompt's description names, somewhere within; 0."""
    if not isinstance(spec, Mapping):
        return 0
    own = spec.get("length")
    return own if isinstance(own, int) else max((_length(v) for v in spec.values()), default=0)


# -- store.json ------------------------------------------------------------------------------------------------


def read_state(place: str) -> Mapping[str, Any]:
    """Aliases and current versions of a library; {} where none were set. Raises StorageError for a stranger's file."""
    path = Path(place) / STATE
    if files.is_remote(place) or not files.exists(path):
        return {}
    state = files.read_json(path)
    fits = isinstance(state, dict) and all(
        isinstance(part, dict) and all(isinstance(v, str) for v in part.values())
        for part in (state.get("aliases", {}), state.get("current", {}))
    )
    if not fits:
        raise StorageError(f"{str(path)!r} is not what a prompt store writes: restore or delete it")
    return dict(state)


def write_state(place: str, aliases: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Write them, whole or not at all."""
    files.write_json(Path(place) / STATE, {"aliases": dict(aliases), "current": dict(current)})
