"""An ensemble on disk: ensemble.json, which names its members by place and hash; the members stay where they are.
The numbers of a learned gate stand beside it in ensemble.safetensors.

A place is relative to the ensemble's folder where both are local, so a library can be moved as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from incipit import artifact, cards, files
from incipit.artifact import Artifact
from incipit.backbones import Backbone
from incipit.ensemble.ensemble import GATED, METHODS, Ensemble
from incipit.ensemble.sesom import Gate
from incipit.ensemble.sources import prompts_for
from incipit.errors import ArtifactError, PromptError, StorageError

CARD, TENSORS = "ensemble.json", "ensemble.safetensors"
KIND = cards.Kind(
    "ensemble", "incipit ensemble", CARD, TENSORS, 1,
    {"name": str, "method": str, "members": list, "backbone": dict, "task": dict},
)  # fmt: skip


@dataclass(frozen=True)
class Saved(cards.Kept):
    """An ensemble as read from disk: its card and its members, whose hashes were checked."""

    members: tuple[Artifact, ...]
    gate: Gate | None = None

    def ensemble(self, backbone: Backbone) -> Ensemble:
        """The ensemble on this backbone; ArtifactError when it is another one."""
        prompts = prompts_for(self.members, backbone, self.card["task"].get("words", ()))
        return Ensemble(prompts, str(self.card["method"]), tuple(self.card.get("weights", ())), self.gate)


def check_members(members: Sequence[Artifact]) -> None:
    """ArtifactError unless all belong to one backbone and are different prompts."""
    if len(members) < 2:
        raise ArtifactError(
            f"an ensemble of {len(members)} prompt is that prompt: give two or more artifacts of one backbone"
        )
    first = members[0]
    for other in members[1:]:
        here, there = other.card["backbone"], first.card["backbone"]
        if here["fingerprint"] != there["fingerprint"]:
            raise ArtifactError(
                f"prompt {other.name!r} was trained on {here['name']!r}, {first.name!r} on {there['name']!r} "
                "(their fingerprints differ): the prompts of an ensemble read one frozen model; train them on one"
            )
    digests = [member.digest for member in members]
    for member in members:
        if digests.count(member.digest) > 1:
            same = " and ".join(m.place for m in members if m.digest == member.digest)
            raise ArtifactError(f"{same} hold the same prompt: give each once, and set weights instead")


def check_names(members: Sequence[Artifact]) -> None:
    """ArtifactError where two members have one name, by which what is made of each is told apart."""
    names = [member.name for member in members]
    for member in members:
        if names.count(member.name) > 1:
            same = " and ".join(m.place for m in members if m.name == member.name)
            raise ArtifactError(
                f"{same} are both named {member.name!r}, and what is made of each is known by its name: tune one of "
                "them again under another name"
            )


def check_task(members: Sequence[Artifact], words: Sequence[str], template: str) -> None:
    """ArtifactError where a member's label words are not those of the task, in their order, or its input differs."""
    for member in members:
        if tuple(member.words) != tuple(words):
            raise ArtifactError(
                f"prompt {member.name!r} chooses among {', '.join(map(repr, member.words)) or 'free text'}, the task "
                f"among {', '.join(map(repr, words)) or 'free text'}: the labels of an ensemble must be the same "
                "words in the same order; name the task with --task to read every prompt with its words"
            )
        if member.task.get("input", "") != template:
            raise ArtifactError(
                f"prompt {member.name!r} was trained on the input {member.task.get('input', '')!r}, the task writes "
                f"{template!r}: the prompts of an ensemble read one text; name the task with --task to give every "
                "prompt its form"
            )


def save(
    place: files.PathLike,
    *,
    name: str,
    ensemble: Ensemble,
    members: Sequence[Artifact],
    task: Mapping[str, Any],
    scores: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    curve: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> str:
    """Write the card, whole or not at all; returns the place. curve: of a gate that was learned, as in a prompt's card.

    Raises ArtifactError for members that do not go together, StorageError where something else is at the place.
    """
    check_members(members)
    if files.is_remote(place):
        raise StorageError(f"{str(place)!r}: an ensemble is written to a local folder; copy it from there")
    if overwrite:
        KIND.check_replaceable(place)
    gate = ensemble.gate
    tensors = dict(gate.state_dict()) if gate is not None else None
    card = KIND.made(
        name, members[0].card["backbone"], task, tensors, scores=scores, data=data,
        method=ensemble.method,
        weights=list(ensemble.weights),
        members=[
            {"name": m.name, "place": _relative(m.place, place), "sha256": m.digest, "length": p.length}
            for m, p in zip(members, ensemble.prompts, strict=True)
        ],
        parameters=sum(int(m.card.get("parameters", 0)) for m in members)
        + (sum(p.numel() for p in gate.parameters()) if gate is not None else 0),
        **({"curve": dict(curve)} if curve else {}),
        **({"gate": gate.spec()} if gate is not None else {}),
    )  # fmt: skip
    return KIND.write(place, card, tensors, _page(card), overwrite=overwrite)


def is_ensemble(place: files.PathLike) -> bool:
    """Whether a local folder holds an ensemble."""
    return KIND.stands_at(place)


def load(place: files.PathLike, library: files.PathLike = "") -> Saved:
    """Read an ensemble and its members; each must have the hash that the card names.

    library: a folder whose artifacts take the place of members that are not where the card says, found by hash.
    """
    KIND.check_there(Path(place), str(place), CARD)
    card = parse_card(files.content(Path(place) / CARD), str(place))
    return assembled(place, card, lambda where, sha256: _found(where, sha256, library))


def assembled(
    place: files.PathLike, card: Mapping[str, Any], find: Callable[[str, str], Artifact | None]
) -> Saved:
    """The ensemble of a card that was read. find(where, sha256): what should be that member; None where nothing is."""
    members = tuple(_member(row, place, find) for row in card["members"])
    check_members(members)
    return Saved(str(place), card, members, _gate(card, place))


def far_members(place: files.PathLike) -> list[str]:
    """Places of members that do not lie below the folder that holds the ensemble's: a library of it lacks them."""
    home, found = Path(place).resolve().parent, []
    for row in parse_card(files.content(Path(place) / CARD), str(place))["members"]:
        where = _where(row["place"], place)
        if files.is_remote(where) or home not in Path(where).resolve().parents:
            found.append(where)
    return found


def _where(member: str, place: files.PathLike) -> str:
    """The address of a member from what the card says of it."""
    return member if files.is_remote(member) else os.path.normpath(os.path.join(str(place), member))


def parse_card(data: bytes, place: str) -> dict[str, Any]:
    """An ensemble.json with its schema checked; ArtifactError for one of another version or with parts missing."""
    card = KIND.parse(data, place)
    wanted = ("name", "place", "sha256")
    whole = all(
        isinstance(m, dict) and all(isinstance(m.get(k), str) for k in wanted) for m in card["members"]
    )
    KIND.check_whole([] if whole else ["name, place and sha256 of a member"], place)
    if card["method"] not in METHODS:
        raise ArtifactError(
            f"{place!r} was written by a newer incipit (method {card['method']!r}): upgrade incipit"
        )
    return card


def _gate(card: Mapping[str, Any], place: files.PathLike) -> Gate | None:
    """The learned gate with its numbers; None for a method without one."""
    if card["method"] not in GATED:
        return None
    lacking = [key for key in ("gate", "tensors") if not isinstance(card.get(key), dict)]
    KIND.check_whole(lacking, str(place))
    tensors = KIND.numbers(Path(place), str(place), card["tensors"])
    try:
        with torch.device("meta"):  # a card may ask for any size; its numbers are there already
            gate = Gate.built(card["gate"])
        gate.load_state_dict({n: t.float() for n, t in tensors.items()}, assign=True)
    except (PromptError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{str(place)!r}: the numbers of its gate do not fit its card: copy it again from its source"
        ) from error
    return gate.eval()


def _member(
    row: Mapping[str, str], place: files.PathLike, find: Callable[[str, str], Artifact | None]
) -> Artifact:
    """The artifact that a row of the card names."""
    where = _where(row["place"], place)
    found = find(where, row["sha256"])
    if found is None:
        raise ArtifactError(
            f"{str(place)!r}: its member {row['name']!r} is not at {where!r}: put it back there, or write the "
            "ensemble again"
        )
    if found.digest != row["sha256"]:
        raise ArtifactError(
            f"{str(place)!r}: {where!r} is not the prompt {row['name']!r} that the ensemble was made of (another "
            "hash): restore that prompt, or write the ensemble again"
        )
    return found


def _found(where: str, sha256: str, library: files.PathLike) -> Artifact | None:
    """What stands there, or else what has the hash in the library."""
    found = None
    if files.is_remote(where) or files.exists(Path(where) / artifact.CARD):
        found = artifact.load(where)
    if (found is None or found.digest != sha256) and library:
        from incipit.library import entries

        chosen = [e.artifact for e in entries(library) if e.artifact and e.artifact.digest == sha256]
        found = chosen[0] if chosen else found
    return found


def _relative(member: str, place: files.PathLike) -> str:
    if files.is_remote(member) or files.is_remote(place):
        return member
    return Path(os.path.relpath(Path(member).resolve(), Path(place).resolve())).as_posix()


def _page(card: Mapping[str, Any]) -> str:
    """README.md of the folder."""
    lines = [
        f"# {card['name']}",
        "",
        f"An ensemble of {len(card['members'])} soft prompts for the frozen model `{card['backbone']['name']}`: "
        f"{METHODS[card['method']]}.",
        "",
        *(f"- `{m['name']}` at `{m['place']}`, {m['sha256'][:12]}" for m in card["members"]),
    ]
    return "\n".join([*lines, *cards.last_lines(card)])
