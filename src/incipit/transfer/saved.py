"""An ATTEMPT on disk: attempt.json and attempt.safetensors, which holds target, sources and attention alike.

The sources' rows are its own copy, so the folder needs no other; it can be moved and predicted with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from incipit import artifact, cards, files
from incipit.backbones import Backbone
from incipit.errors import ArtifactError, PromptError, StorageError
from incipit.prompts import build
from incipit.transfer.attempt import Attempt

CARD, TENSORS = "attempt.json", "attempt.safetensors"
KIND = cards.Kind(
    "ATTEMPT", "incipit transfer", CARD, TENSORS, 1,
    {"name": str, "prompt": dict, "inner": int, "sources": list, "tensors": dict, "backbone": dict, "task": dict},
)  # fmt: skip


@dataclass(frozen=True)
class SavedAttempt(cards.Kept):
    """As read from disk. card: like an artifact's, and the names and hashes of its sources."""

    tensors: Mapping[str, Tensor]

    def attempt(self, backbone: Backbone) -> Attempt:
        """The mixture on this backbone. Raises ArtifactError when it was trained on another one."""
        artifact.check_backbone("ATTEMPT", self.card, backbone)
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
    if overwrite:
        KIND.check_replaceable(place)
    if len(sources) != len(attempt.sources):
        raise ArtifactError(f"{len(sources)} names of {len(attempt.sources)} sources: give each its own")
    baked = attempt.target.bake()
    tensors = {n: t for n, t in attempt.state_dict().items() if not n.startswith("target.")}
    tensors |= {f"target.{n}": t for n, t in baked.state_dict().items()}
    card = KIND.made(
        name, artifact.backbone_table(backbone), task, tensors, scores=scores, data=data,
        prompt=baked.spec(), recipe=dict(recipe or {}),
        inner=attempt.down.out_features,
        sources=[{"name": n, "sha256": digest} for n, digest in sources.items()],
        parameters=sum(p.numel() for p in attempt.parameters() if p.requires_grad),
    )  # fmt: skip
    return KIND.write(place, card, tensors, _page(card), overwrite=overwrite)


def is_attempt(place: files.PathLike) -> bool:
    """Whether a local folder holds one."""
    return KIND.stands_at(place)


def load(place: files.PathLike) -> SavedAttempt:
    """Read and check; ArtifactError says what is missing, damaged or not understood."""
    KIND.check_there(Path(place), str(place), CARD, TENSORS)
    card = KIND.parse(files.content(Path(place) / CARD), str(place))
    return SavedAttempt(str(place), card, KIND.numbers(Path(place), str(place), card["tensors"]))


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
    return "\n".join([*lines, *cards.last_lines(card)])
