"""Artifact: a trained prompt on disk. A folder of prompt.safetensors, card.json and README.md, written atomically.

The card holds no clock time, so equal runs write equal bytes. Nothing is unpickled. `place` is a local folder or
anything that fsspec addresses (s3://, hf://, memory://).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from incipit import files
from incipit.errors import ArtifactError, StorageError
from incipit.prompts import Prompt, build
from incipit.prompts.masked import held_at_zero

if TYPE_CHECKING:
    from incipit.backbones import Backbone

SCHEMA = 1
TENSORS, CARD, README = "prompt.safetensors", "card.json", "README.md"
_CARD = {"name": str, "prompt": dict, "tensors": dict, "backbone": dict, "task": dict}  # what none lacks
_PARTS = {
    "config": "configuration",
    "embeddings": "embedding matrix",
    "weights": "weights",
    "tokenizer": "vocabulary",
}


@dataclass(frozen=True)
class Artifact:
    """A prompt as read from disk. card: see docs/artifact.md; tensors: the state of the baked prompt."""

    place: str
    card: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        """The artifact's own name."""
        return str(self.card["name"])

    @property
    def task(self) -> dict[str, Any]:
        """Text form: kind, input template, label words, metrics, decoding."""
        return dict(self.card["task"])

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
        differs = differences(self.card["backbone"], backbone)
        if differs and not force:
            raise ArtifactError(
                f"prompt {self.name!r} was trained on {self.card['backbone']['name']!r}, this is {backbone.name!r}: "
                f"{'; '.join(differs)}; load that backbone, or train the prompt on this one"
            )
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


def differences(card: Mapping[str, Any], backbone: Backbone) -> list[str]:
    """What separates the backbone of a card from this one, in words; [] when they are the same."""
    found = []
    if card["hidden"] != backbone.geometry.hidden:
        found.append(f"hidden size {card['hidden']} there, {backbone.geometry.hidden} here")
    for key, text in _PARTS.items():
        if card["fingerprint"].get(key) != backbone.fingerprint[key]:
            found.append(f"other {text}" if key == "weights" else f"another {text}")
    return found


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
    tensors = {n: t.detach().cpu() for n, t in baked.state_dict().items()}
    _finite(tensors, name)
    card = {
        "schema": SCHEMA,
        "name": name,
        "prompt": baked.spec(),
        "parameters": sum(t.numel() for t in tensors.values()) - held_at_zero(baked),
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
        **({"origin": dict(origin)} if origin else {}),
        **({"curve": dict(curve)} if curve else {}),
    }
    if pruned:
        card["pruned"] = dict(pruned)
    if files.is_remote(place):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "artifact"
            folder.mkdir()
            _write(folder, tensors, card)
            files.push_folder(folder, place, overwrite=overwrite)
    else:
        with files.atomic_folder(place, overwrite=overwrite) as folder:
            _write(folder, tensors, card)
    return str(place)


def check_replaceable(place: files.PathLike) -> None:
    """StorageError when a local place holds anything but an artifact."""
    if files.is_remote(place) or not files.exists(place):
        return
    names = files.folder_files(place)
    if names is None or (not {CARD, TENSORS} & set(names) and files.file_size(place)):
        raise StorageError(f"{str(place)!r} exists and is no prompt artifact: choose another name or folder")


def _write(folder: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    files.save_tensors(folder / TENSORS, tensors, {"format": "pt"})
    files.atomic_write(folder / README, model_card(card))
    files.write_json(folder / CARD, card)


def load(place: files.PathLike) -> Artifact:
    """Read and check an artifact; ArtifactError says what is missing, damaged or not understood."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = files.fetch_folder(place, Path(scratch) / "artifact")
        missing = [n for n in (CARD, TENSORS) if not files.exists(folder / n)]
        if missing:
            raise ArtifactError(
                f"{str(place)!r} is no prompt artifact: {' and '.join(missing)} not found there; "
                f"{_below(place) or 'give a folder that `incipit tune` wrote'}"
            )
        card = read_card(folder / CARD, str(place))
        try:
            tensors, _ = files.load_tensors(folder / TENSORS)
        except ArtifactError as error:
            raise ArtifactError(f"{str(place)!r}: {error}") from error
    if strangers := sorted(set(tensors) - set(card["tensors"])):
        raise ArtifactError(
            f"{str(place)!r}: the card does not name tensor {', '.join(map(repr, strangers))}: "
            "the folder was mixed up or edited; copy it again from its source"
        )
    for name, digest in card["tensors"].items():
        if name not in tensors or files.sha256_tensor(tensors[name]) != digest:
            raise ArtifactError(
                f"{str(place)!r}: tensor {name!r} does not have the hash that the card names: "
                "the file was damaged or changed; copy it again from its source"
            )
    _finite(tensors, str(place))
    return Artifact(str(place), card, tensors)


def _below(place: files.PathLike) -> str:
    """What to do where a run's folder was named: its artifacts stand one folder deeper."""
    if files.is_remote(place):
        return ""
    found = sorted(str(p.parent) for p in Path(place).glob(f"*/{CARD}") if not p.parent.name.startswith("."))
    listed = ", ".join(map(repr, found[:3])) + (", ..." if len(found) > 3 else "")
    return f"name an artifact below it: {listed}" if found else ""


def read_card(path: files.PathLike, place: str) -> dict[str, Any]:
    """A card.json with its schema checked; ArtifactError for one of another version or with parts missing."""
    return parse_card(files.content(path), place)


def parse_card(data: bytes, place: str) -> dict[str, Any]:
    """The same of bytes that were read already."""
    try:
        card = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{place!r}: {CARD} is not valid JSON: {error}; restore or rewrite the file"
        ) from error
    if not isinstance(card, dict) or not isinstance(card.get("schema"), int):
        raise ArtifactError(f"{place!r}: card.json names no schema; it is no prompt artifact")
    if card["schema"] > SCHEMA:
        raise ArtifactError(
            f"{place!r} was written by a newer incipit (schema {card['schema']}, known: {SCHEMA}): "
            "upgrade incipit"
        )
    lacking = [k for k, kind in _CARD.items() if not isinstance(card.get(k), kind)]
    if not lacking:
        lacking = [f"backbone.{k}" for k in ("name", "hidden", "fingerprint") if k not in card["backbone"]]
        lacking += [f"task.{k}" for k in ("kind",) if k not in card["task"]]
    if lacking:
        raise ArtifactError(f"{place!r}: card.json lacks {', '.join(lacking)}: restore it from its source")
    return card


def _finite(tensors: Mapping[str, Tensor], where: str) -> None:
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise ArtifactError(
            f"{where!r}: tensor {bad[0]!r} holds NaN or infinite numbers: the training diverged or the "
            "file is damaged; train again with a smaller lr, or copy it again"
        )


def model_card(card: Mapping[str, Any]) -> str:
    """The README.md of an artifact, in the form that model hubs show."""
    base, task, scores = card["backbone"], card["task"], card["scores"]
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
    if card["prompt"].get("kind") == "isolated":
        body.append("- attention: isolated (the prompt does not see the input)")
    if pruned := card.get("pruned"):
        body.append(f"- pruned: {pruned['kept']:,} of {pruned['numbers']:,} numbers kept")
    for split, values in scores.items():
        body.append(f"- {split}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
    body += ["", "Use it:", "", "```bash", 'incipit predict THIS_FOLDER --text "your text"', "```", ""]
    return "\n".join(head + body)
