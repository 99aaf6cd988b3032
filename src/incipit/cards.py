"""A card and its numbers: what a prompt, an ensemble and an ATTEMPT on disk have in common.

The card is JSON: a schema, a name, the backbone with its fingerprint, the task, and the sha256 of every tensor of the
safetensors file beside it. It holds no clock time, so equal runs write equal bytes. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from incipit import files
from incipit.errors import ArtifactError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

README = "README.md"
BACKBONE, TASK = ("name", "hidden", "fingerprint"), ("kind",)  # what no card lacks in these tables


@dataclass(frozen=True)
class Kept:
    """A folder as read from disk."""

    place: str
    card: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its own name."""
        return str(self.card["name"])

    @property
    def task(self) -> dict[str, Any]:
        """Text form: kind, input template, label words, metrics, decoding."""
        return dict(self.card["task"])


@dataclass(frozen=True)
class Kind:
    """One kind of such a folder, and its checks.

    called: in words, after "is no". verb: the command that writes it. keys: what no card lacks, with its type.
    """

    called: str
    verb: str
    card: str
    tensors: str
    schema: int
    keys: Mapping[str, type]

    # -- writing ---------------------------------------------------------------------------------------------------

    def made(
        self,
        name: str,
        backbone: Mapping[str, Any],
        task: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None,
        *,
        scores: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        **own: Any,
    ) -> dict[str, Any]:
        """A card: what all kinds say, and what is `own` to this one. tensors: None where it has no numbers."""
        return {
            "schema": self.schema,
            "name": name,
            "backbone": dict(backbone),
            "task": dict(task),
            "scores": dict(scores or {}),
            "data": dict(data or {}),
            "versions": files.package_versions("incipit", "torch", "transformers"),
            **(
                {}
                if tensors is None
                else {"tensors": {n: files.sha256_tensor(t) for n, t in tensors.items()}}
            ),
            **own,
        }

    def write(
        self,
        place: files.PathLike,
        card: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None,
        page: str,
        *,
        overwrite: bool = False,
    ) -> str:
        """A local folder, whole or not at all; returns the place.

        Raises ArtifactError for numbers that are not finite, StorageError where something is in the way.
        """
        check_finite(tensors or {}, str(card["name"]))
        with files.atomic_folder(place, overwrite=overwrite) as folder:
            if tensors is not None:
                files.save_tensors(folder / self.tensors, tensors, {"format": "pt"})
            files.atomic_write(folder / README, page)
            files.write_json(folder / self.card, card)
        return str(place)

    def check_replaceable(self, place: files.PathLike) -> None:
        """StorageError when a local place holds anything of another kind."""
        if files.is_remote(place) or not files.exists(place):
            return
        names = files.folder_files(place)
        if names is None or (not {self.card, self.tensors} & set(names) and files.file_size(place)):
            raise StorageError(
                f"{str(place)!r} exists and is no {self.called}: choose another name or folder"
            )

    # -- reading ---------------------------------------------------------------------------------------------------

    def stands_at(self, place: files.PathLike) -> bool:
        """Whether a local folder holds one."""
        return not files.is_remote(place) and files.exists(Path(place) / self.card)

    def check_there(self, folder: Path, place: str, *names: str) -> None:
        """ArtifactError unless the folder, which was read from `place`, holds these files."""
        missing = [n for n in names if not files.exists(folder / n)]
        if missing:
            raise ArtifactError(
                f"{place!r} is no {self.called}: {' and '.join(missing)} not found there; "
                f"{self._below(place) or f'give a folder that `{self.verb}` wrote'}"
            )

    def _below(self, place: str) -> str:
        """What to do where a run's folder was named: what it wrote stands one folder deeper."""
        if files.is_remote(place):
            return ""
        found = sorted(str(p.parent) for p in Path(place).glob(f"*/{self.card}") if p.parent.name[:1] != ".")
        listed = ", ".join(map(repr, found[:3])) + (", ..." if len(found) > 3 else "")
        return f"name an {self.called.split()[-1]} below it: {listed}" if found else ""

    def parse(self, data: bytes, place: str) -> dict[str, Any]:
        """A card with its schema checked; ArtifactError for one of another version or with parts missing."""
        try:
            card = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(
                f"{place!r}: {self.card} is not valid JSON: {error}; restore or rewrite the file"
            ) from error
        if not isinstance(card, dict) or not isinstance(card.get("schema"), int):
            raise ArtifactError(f"{place!r}: {self.card} names no schema; it is no {self.called}")
        if card["schema"] > self.schema:
            raise ArtifactError(
                f"{place!r} was written by a newer incipit (schema {card['schema']}, known: {self.schema}): "
                "upgrade incipit"
            )
        lacking = [k for k, kind in self.keys.items() if not isinstance(card.get(k), kind)]
        if not lacking:
            lacking = [f"backbone.{k}" for k in BACKBONE if k not in card["backbone"]]
            lacking += [f"task.{k}" for k in TASK if k not in card["task"]]
        self.check_whole(lacking, place)
        return card

    def check_whole(self, lacking: list[str], place: str) -> None:
        """ArtifactError where a card lacks something."""
        if lacking:
            raise ArtifactError(
                f"{place!r}: {self.card} lacks {', '.join(lacking)}: restore it from its source"
            )

    def numbers(self, folder: Path, place: str, named: Mapping[str, str]) -> dict[str, Tensor]:
        """The tensors of a folder. named: the sha256 of each; ArtifactError for others, and for what is not finite."""
        self.check_there(folder, place, self.tensors)
        try:
            tensors, _ = files.load_tensors(folder / self.tensors)
        except ArtifactError as error:
            raise ArtifactError(f"{place!r}: {error}") from error
        if strangers := sorted(set(tensors) - set(named)):
            raise ArtifactError(
                f"{place!r}: the card does not name tensor {', '.join(map(repr, strangers))}: "
                "the folder was mixed up or edited; copy it again from its source"
            )
        for name, digest in named.items():
            if name not in tensors or files.sha256_tensor(tensors[name]) != digest:
                raise ArtifactError(
                    f"{place!r}: tensor {name!r} does not have the hash that the card names: "
                    "the file was damaged or changed; copy it again from its source"
                )
        check_finite(tensors, place)
        return tensors


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """ArtifactError for NaN or infinite numbers."""
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        raise ArtifactError(
            f"{where!r}: tensor {bad[0]!r} holds NaN or infinite numbers: the training diverged or the "
            "file is damaged; train again with a smaller lr, or copy it again"
        )


def last_lines(card: Mapping[str, Any]) -> list[str]:
    """How the README.md of every kind ends: scores, and how to use it."""
    told = [
        f"- {split}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items())
        for split, values in card["scores"].items()
    ]
    return [*told, "", "Use it:", "", "```bash", 'incipit predict THIS_FOLDER --text "your text"', "```", ""]
