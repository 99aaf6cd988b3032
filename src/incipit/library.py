"""A place full of artifacts: a folder, or whatever fsspec addresses (s3://, hf://, memory://)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from incipit import artifact, files
from incipit.artifact import Artifact
from incipit.errors import ArtifactError, IncipitError, StorageError, nearest


@dataclass(frozen=True)
class Entry:
    """One folder of a library. artifact: what it holds; None where it is broken, and `reason` says how."""

    place: str
    artifact: Artifact | None
    reason: str = ""

    @property
    def name(self) -> str:
        """The artifact's own name; of a broken one the last part of its place."""
        return self.artifact.name if self.artifact else self.place.rstrip("/").rsplit("/", 1)[-1]

    def row(self) -> dict[str, Any]:
        """What a listing shows of it, JSON-able."""
        if self.artifact is None:
            return {"name": self.name, "place": self.place, "broken": self.reason}
        card = self.artifact.card
        return {
            "name": self.name,
            "place": self.place,
            "task": card["task"].get("name", ""),
            "kind": card["task"].get("kind", ""),
            "backbone": card["backbone"]["name"],
            "parameters": card.get("parameters", 0),
            "bytes": self.artifact.size,
            "scores": card.get("scores", {}),
        }


def entries(place: files.PathLike) -> list[Entry]:
    """Every artifact at or below `place`, read and checked, in order of place; broken ones with their reason.

    Raises StorageError when the place cannot be read at all.
    """
    if not files.is_remote(place) and not files.exists(place):
        raise StorageError(f"{str(place)!r} does not exist; name a folder below which `incipit tune` wrote")
    if not files.is_remote(place) and files.folder_files(place) is None:
        raise StorageError(f"{str(place)!r} is a file; name a folder below which `incipit tune` wrote")
    try:  # a card without tensors and tensors without a card are both halves of an artifact
        marked = {*files.list_folders(place, artifact.CARD), *files.list_folders(place, artifact.TENSORS)}
    except (OSError, ValueError, ImportError) as error:
        raise StorageError(f"listing {str(place)!r} failed: {error}; check the address and access") from error
    return [_entry(folder) for folder in sorted(marked)]


def _entry(place: str) -> Entry:
    try:
        return Entry(place, artifact.load(place))
    except IncipitError as error:
        return Entry(place, None, str(error))


def find(place: files.PathLike, name: str) -> Artifact:
    """The one artifact of that name; ArtifactError when there is none (names the nearest), or several."""
    known = entries(place)
    found = [entry for entry in known if entry.name == name]
    if len(found) > 1:
        places = ", ".join(entry.place for entry in found)
        raise ArtifactError(
            f"{str(place)!r} holds {len(found)} prompts named {name!r}: {places}; give the folder"
        )
    if not found:
        hint = nearest(name, [entry.name for entry in known])
        raise ArtifactError(f"{str(place)!r} holds no prompt named {name!r}{hint}")
    (entry,) = found
    if entry.artifact is None:
        raise ArtifactError(entry.reason)
    return entry.artifact
