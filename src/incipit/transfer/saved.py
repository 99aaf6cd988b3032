"""An ATTEMPT on disk: attempt.json and attempt.safetensors, which holds target, sources and attention alike.

The sources' rows are its own copy, so the folder needs no other; it can be moved and predicted with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from incipit import artifact, files
from incipit.backbones import Backbone
from incipit.errors import ArtifactError, PromptError, StorageError
from incipit.prompts import build
from incipit.transfer.attempt import Attempt

SCHEMA = 1
CARD, TENSORS, README = "attempt.json", "attempt.safetensors", "README.md"
_CARD = {
    "name": str, "prompt": dict, "inner": int, "sources": list, "tensors": dict, "backbone": dict, "task": dict
}  # fmt: skip


@dataclass(frozen=True)
class SavedAttempt:
    """As read from disk. card: like an artifact's, and the names and hashes of its sources."""

    place: str
    card: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        """Its own name."""
        return str(self.card["name"])

    @property
    def task(self) -> dict[str, Any]:
        """Text form, as of an Artifact."""
        return dict(self.card["task"])

    def attempt(self, backbone: Backbone) -> Attempt:
        """The mixture on this backbone. Raises ArtifactError when it was trained on another one."""
        differs = artifact.differences(self.card["backbone"], backbone)
        if differs:
            raise ArtifactError(
                f"ATTEMPT {self.name!r} was trained on {self.card['backbone']['name']!r}, this is {backbone.name!r}: "
                f"{'; '.join(differs)}; load that backbone, or train it on this one"
            )
        try:
            target = build(self.card["prompt"], backbone.geometry, backbone.embed)
            made = Attempt(target, list(self.tensors["sources"]), int(self.card["inner"]))
            made.load_state_dict(dict(self.tensors))
        except (KeyError, RuntimeError, PromptError) as error:
            raise ArtifactError(
                f"{self.place}: the numbers do not fit the card: the folder was mixed up or edited; copy it again "
                "from its source"
            ) from error
        return made.to(backbone.device).eval()


def save(
    place: files.PathLike,
    *,
    attempt: Attempt,
    sources: Mapping[str, str],
    backbone: Backbone,
    name: str,
    task: Mapping[str, Any],
    recipe: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> str:
    """Write it, whole or not at all; returns the place. sources: name -> hash of each, in their order.

    Raises StorageError where something else is at the place, ArtifactError for numbers that are not finite.
    """
    if files.is_remote(place):
        raise StorageError(f"{str(place)!r}: an ATTEMPT is written to a local folder; copy it from there")
    names = files.folder_files(place)
    if overwrite and files.exists(place) and names != [] and CARD not in (names or ()):
        raise StorageError(f"{str(place)!r} exists and is no ATTEMPT: choose another name or folder")
    if len(sources) != len(attempt.sources):
        raise ArtifactError(f"{len(sources)} names of {len(attempt.sources)} sources: give each its own")
    baked = attempt.target.bake()
    tensors = {
        n: t.detach().cpu().contiguous()
        for n, t in attempt.state_dict().items()
        if not n.startswith("target.")
    }
    tensors |= {f"target.{n}": t.detach().cpu().contiguous() for n, t in baked.state_dict().items()}
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        raise ArtifactError(
            f"{name!r}: {bad[0]!r} holds NaN or infinite numbers: train again with a smaller lr"
        )
    card = {
        "schema": SCHEMA,
        "name": name,
        "prompt": baked.spec(),
        "inner": attempt.down.out_features,
        "sources": [{"name": n, "sha256": digest} for n, digest in sources.items()],
        "parameters": sum(p.numel() for p in attempt.parameters() if p.requires_grad),
        "tensors": {n: files.sha256_tensor(t) for n, t in tensors.items()},
        "backbone": {
            "name": backbone.name,
            "family": backbone.family,
            "hidden": backbone.geometry.hidden,
            "fingerprint": backbone.fingerprint,
        },
        "task": dict(task),
        "recipe": dict(recipe or {}),
        "scores": dict(scores or {}),
        "data": dict(data or {}),
        "versions": files.package_versions("incipit", "torch", "transformers"),
    }
    with files.atomic_folder(place, overwrite=overwrite) as folder:
        files.save_tensors(folder / TENSORS, tensors, {"format": "pt"})
        files.atomic_write(folder / README, _page(card))
        files.write_json(folder / CARD, card)
    return str(place)


def is_attempt(place: files.PathLike) -> bool:
    """Whether a local folder holds one."""
    return not files.is_remote(place) and CARD in (files.folder_files(place) or ())


def load(place: files.PathLike) -> SavedAttempt:
    """Read and check; ArtifactError says what is missing, damaged or not understood."""
    if not is_attempt(place):
        raise ArtifactError(
            f"{str(place)!r} is no ATTEMPT: {CARD} not found there; give a folder that `incipit transfer` wrote"
        )
    try:
        card = json.loads(files.content(Path(place) / CARD))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{str(place)!r}: {CARD} is not valid JSON: {error}; restore the file") from error
    lacking = [
        k for k, kind in _CARD.items() if not (isinstance(card, dict) and isinstance(card.get(k), kind))
    ]
    if not lacking:
        lacking = [f"backbone.{k}" for k in ("name", "hidden", "fingerprint") if k not in card["backbone"]]
    if lacking:
        raise ArtifactError(f"{str(place)!r}: {CARD} lacks {', '.join(lacking)}: restore it from its source")
    if card.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{str(place)!r} was written by a newer incipit (schema {card.get('schema')}): upgrade incipit"
        )
    tensors = files.load_tensors(Path(place) / TENSORS)[0] if files.exists(Path(place) / TENSORS) else {}
    if {n: files.sha256_tensor(t) for n, t in tensors.items()} != card["tensors"]:
        raise ArtifactError(
            f"{str(place)!r}: {TENSORS} does not hold the numbers that {CARD} names: the folder was damaged or "
            "mixed up; copy it again from its source"
        )
    return SavedAttempt(str(place), card, tensors)


def _page(card: Mapping[str, Any]) -> str:
    """README.md of the folder."""
    lines = [
        f"# {card['name']}",
        "",
        f"A mixture of {len(card['sources'])} source prompts for each input (ATTEMPT), for the frozen model "
        f"`{card['backbone']['name']}`: {card['parameters']:,} trained numbers.",
        "",
        *(f"- source `{one['name']}`, {one['sha256'][:12]}" for one in card["sources"]),
    ]
    for split, values in card["scores"].items():
        lines.append(f"- {split}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
    use = ["", "Use it:", "", "```bash", 'incipit predict THIS_FOLDER --text "your text"', "```", ""]
    return "\n".join([*lines, *use])
