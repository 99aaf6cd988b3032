"""Artifact: a trained prompt on disk. A folder of prompt.safetensors, card.json and README.md, written atomically.

`place` is a local folder or anything that fsspec addresses (s3://, hf://, memory://).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from incipit import cards, files
from incipit.errors import ArtifactError
from incipit.prompts import Prompt, build
from incipit.prompts.masked import held_at_zero

if TYPE_CHECKING:
    from incipit.backbones import Backbone

TENSORS, CARD, README = "prompt.safetensors", "card.json", cards.README
KIND = cards.Kind(
    "prompt artifact", "incipit tune", CARD, TENSORS, 1,
    {"name": str, "prompt": dict, "tensors": dict, "backbone": dict, "task": dict},
)  # fmt: skip
_PARTS = {
    "config": "configuration",
    "embeddings": "embedding matrix",
    "weights": "weights",
    "tokenizer": "vocabulary",
}


@dataclass(frozen=True)
class Artifact(cards.Kept):
    """A prompt as read from disk. card: see docs/artifact.md; tensors: the state of the baked prompt."""

    tensors: Mapping[str, Tensor]

    @property
    def words(self) -> tuple[str, ...]:
        """Label words; () for free text."""
        return tuple(self.card["task"].get("words", ()))

    @property
    def digest(self) -> str:
        """sha256 of what it computes: the numbers, their form, the backbone. Names and scores do not count."""
        return digest_of(self.card)

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def prompt(self, backbone: Backbone, *, force: bool = False) -> Prompt:
        """The prompt on this backbone. Raises ArtifactError when it was trained on another one (unless `force`)."""
        if not force:
            check_backbone("prompt", self.card, backbone)
        prompt = build(self.card["prompt"], backbone.geometry, backbone.embed)
        own = prompt.state_dict()
        wrong = [n for n in own if n not in self.tensors or self.tensors[n].shape != own[n].shape]
        wrong += [n for n in self.tensors if n not in own]
        if wrong:
            raise ArtifactError(
                f"{self.place}: tensors {', '.join(sorted(wrong))} do not fit the card: "
                "the folder was mixed up or edited; copy it again from its source"
            )
        prompt.load_state_dict(dict(self.tensors))
        return prompt.to(backbone.device).eval()


def digest_of(card: Mapping[str, Any]) -> str:
    """The digest of an artifact, from its card alone: the card names the hash of every tensor."""
    parts = {k: card[k] for k in ("prompt", "tensors")}
    return files.sha256_json(parts | {"backbone": card["backbone"]["fingerprint"]})


def backbone_table(backbone: Backbone) -> dict[str, Any]:
    """A backbone as every card tells of it."""
    return {
        "name": backbone.name,
        "family": backbone.family,
        "hidden": backbone.geometry.hidden,
        "fingerprint": backbone.fingerprint,
    }


def differences(card: Mapping[str, Any], backbone: Backbone) -> list[str]:
    """What separates the backbone of a card from this one, in words; [] when they are the same."""
    found = []
    if card["hidden"] != backbone.geometry.hidden:
        found.append(f"hidden size {card['hidden']} there, {backbone.geometry.hidden} here")
    for key, text in _PARTS.items():
        if card["fingerprint"].get(key) != backbone.fingerprint[key]:
            found.append(f"other {text}" if key == "weights" else f"another {text}")
    return found


def check_backbone(what: str, card: Mapping[str, Any], backbone: Backbone) -> None:
    """ArtifactError when a card is of another backbone. what: the card is of, in words."""
    if differs := differences(card["backbone"], backbone):
        raise ArtifactError(
            f"{what} {card['name']!r} was trained on {card['backbone']['name']!r}, this is {backbone.name!r}: "
            f"{'; '.join(differs)}; load that backbone, or train the {what} on this one"
        )


def save(
    place: files.PathLike,
    *,
    prompt: Prompt,
    backbone: Backbone,
    name: str,
    task: Mapping[str, Any],
    recipe: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    pruned: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
    curve: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> str:
    """Bake the prompt and write it, whole or not at all; returns the place.

    task: its text form (kind, input, words, metrics). scores: split -> metric -> value. data: "task" -> sha256 of
    its examples. pruned: how it was pruned, of a prompt that was. origin: how it came of other prompts, where no recipe
    trained it. curve: how it fared on validation by step, as `train.Outcome.curve` tells it. overwrite: replace an
    artifact that is there; nothing else is ever replaced.
    """
    if overwrite:
        check_replaceable(place)
    baked = prompt.bake()
    tensors = dict(baked.state_dict())
    own = {"pruned": pruned, "origin": origin, "curve": curve}
    card = KIND.made(
        name, backbone_table(backbone), task, tensors, scores=scores, data=data,
        prompt=baked.spec(), recipe=dict(recipe or {}),
        parameters=sum(t.numel() for t in tensors.values()) - held_at_zero(baked),
        **{key: dict(value) for key, value in own.items() if value},
    )  # fmt: skip
    page = model_card(card)
    if not files.is_remote(place):
        return KIND.write(place, card, tensors, page, overwrite=overwrite)
    with tempfile.TemporaryDirectory() as scratch:
        folder = KIND.write(Path(scratch) / "artifact", card, tensors, page)
        files.push_folder(Path(folder), place, overwrite=overwrite)
    return str(place)


def check_replaceable(place: files.PathLike) -> None:
    """StorageError when a local place holds anything but an artifact."""
    KIND.check_replaceable(place)


def load(place: files.PathLike) -> Artifact:
    """Read and check an artifact; ArtifactError says what is missing, damaged or not understood."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = files.fetch_folder(place, Path(scratch) / "artifact")
        KIND.check_there(folder, str(place), CARD, TENSORS)
        card = parse_card(files.content(folder / CARD), str(place))
        tensors = KIND.numbers(folder, str(place), card["tensors"])
    return Artifact(str(place), card, tensors)


def parse_card(data: bytes, place: str) -> dict[str, Any]:
    """A card.json with its schema checked; ArtifactError for one of another version or with parts missing."""
    return KIND.parse(data, place)


def _behind(spec: Mapping[str, Any] | None) -> bool:
    """Whether a prompt, or one within it, has something behind the input."""
    return spec is not None and bool(spec.get("behind") or _behind(spec.get("inner")))


def model_card(card: Mapping[str, Any]) -> str:
    """The README.md of an artifact, in the form that model hubs show."""
    base, task = card["backbone"], card["task"]
    head = [
        "---",
        "library_name: incipit",
        f"base_model: {json.dumps(base['name'])}",
        "tags: [soft-prompt]",
        "---",
        "",
    ]
    body = [
        f"# {card['name']}",
        "",
        f"A soft prompt of {card['parameters']:,} numbers for the frozen model "
        f"`{base['name']}` (hidden size {base['hidden']}).",
    ]
    if task.get("description"):
        body += ["", str(task["description"])]
    body += [
        "",
        f"- task: {task.get('name', '')} ({task.get('kind', '')})",
        f"- input: `{task.get('input', '')}`",
    ]
    if task.get("words"):
        body.append(f"- label words: {', '.join(task['words'])}")
    if _behind(card["prompt"]):
        body.append("- placement: soft rows or constant text stand behind the input")
    if card["prompt"].get("kind") == "isolated":
        body.append("- attention: isolated (the prompt does not see the input)")
    if within := card["prompt"].get("within"):
        seen = "the rows before it" if within == "before" else "itself alone"
        body.append(f"- visibility: of the prompt a row sees {seen}")
    if pruned := card.get("pruned"):
        body.append(f"- pruned: {pruned['kept']:,} of {pruned['numbers']:,} numbers kept")
    return "\n".join([*head, *body, *cards.last_lines(card)])
