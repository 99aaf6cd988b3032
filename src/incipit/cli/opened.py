"""Artifacts and ensembles, their backbones and their tasks, from what a command line names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from incipit.errors import ArtifactError, BackboneError, DataError, nearest

if TYPE_CHECKING:
    from incipit.artifact import Artifact
    from incipit.backbones import Backbone
    from incipit.ensemble import Saved
    from incipit.recipe import Recipe
    from incipit.tasks.task import Task
    from incipit.transfer import SavedAttempt

Reader = TypeVar("Reader", bound="Artifact | Saved | SavedAttempt")


def artifacts(places: Sequence[str]) -> list[Artifact]:
    """Read and check all; ArtifactError where two go by one name."""
    from incipit import artifact

    return _named([artifact.load(place) for place in places])


def readers(places: Sequence[str]) -> list[Artifact | Saved | SavedAttempt]:
    """The same, where an ensemble or an ATTEMPT may stand in place of an artifact."""
    return _named([_reader(place) for place in places])


def _reader(place: str) -> Artifact | Saved | SavedAttempt:
    from incipit import artifact, ensemble
    from incipit.transfer import is_attempt, saved

    if is_attempt(place):
        return saved.load(place)
    return ensemble.load(place) if ensemble.is_ensemble(place) else artifact.load(place)


def first_of(reader: Artifact | Saved | SavedAttempt) -> Artifact | SavedAttempt:
    """The reader itself, or the first member of an ensemble: whose backbone and decoding count."""
    from incipit.ensemble import Saved

    return reader.members[0] if isinstance(reader, Saved) else reader


def _named(found: list[Reader]) -> list[Reader]:
    """ArtifactError where two go by one name."""
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            places = [one.place for one in found if one.name == name]
            move = "give them in separate calls" if len(set(places)) > 1 else "give each once"
            raise ArtifactError(f"two prompts are named {name!r}: {' and '.join(places)}; {move}")
    return found


class Backbones:
    """Loads each backbone once, on the first accelerator."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self._loaded: dict[tuple[str, str, str, str], Backbone] = {}

    def of(self, reader: Artifact | Saved | SavedAttempt) -> Backbone:
        """The backbone of an artifact or ensemble, or the one that was named instead."""
        artifact = first_of(reader)
        settings = artifact.card.get("recipe", {}).get("backbone", {})
        if self.name:
            return self.named(settings)
        try:
            return self._load(str(artifact.card["backbone"]["name"]), settings, settings.get("revision", ""))
        except BackboneError as error:
            move = "where the model is elsewhere now, say so with --backbone"
            raise BackboneError(f"{artifact.place}: {error}; {move}") from error

    def named(self, settings: Mapping[str, Any] = MappingProxyType({})) -> Backbone:
        """The one that was named, with the type and sentinel of a recipe's settings."""
        return self._load(self.name, settings)

    def _load(self, name: str, settings: Mapping[str, Any], revision: str = "") -> Backbone:
        from incipit.backbones import load

        dtype, sentinel = str(settings.get("dtype", "float32")), str(settings.get("sentinel", ""))
        key = (name, dtype, str(revision), sentinel)
        if key not in self._loaded:  # trust_code is never taken from a card: it would run a stranger's code
            self._loaded[key] = load(
                name, dtype=dtype, device="auto", revision=str(revision) or None, sentinel=sentinel
            )
            for note in self._loaded[key].notes:
                typer.echo(f"note: {note}", err=True)
        return self._loaded[key]


def recipe_of(reader: Artifact | Saved | SavedAttempt) -> Recipe | None:
    """The recipe that trained an artifact, or an ensemble's first member; None where the card holds none."""
    from incipit.recipe import Recipe

    artifact = first_of(reader)
    table: dict[str, Any] = {k: v for k, v in artifact.card.get("recipe", {}).items() if k != "seed"}
    return Recipe.of(table, source=f"the recipe in the card of {artifact.place}") if table else None


def task_named(name: str) -> Task:
    """A built-in task by name, or the [task] table of a recipe file, or a file of its keys alone."""
    from incipit import files
    from incipit.tasks.task import Task, builtin, builtin_names

    if not name.endswith(".toml"):
        if name not in builtin_names():
            known = nearest(name, builtin_names())
            raise DataError(f"no built-in task {name!r}{known or '; name one, or a .toml file'}")
        return builtin(name)
    table = files.read_toml(name)
    keys = table["task"] if isinstance(table.get("task"), dict) else table
    if keys is not table and not {"builtin", "form"} & set(keys):  # as in a recipe: one name will do
        keys = {"name": table.get("name", "run"), **keys}
    if "builtin" in keys:
        changes = {key: value for key, value in keys.items() if key != "builtin"}
        return builtin(str(keys["builtin"]), base=Path(name).parent, **changes)
    return Task.load(keys, base=Path(name).parent)


def own_task(artifact: Artifact | Saved | SavedAttempt, data: str = "", split: str = "test") -> Task:
    """The task that an artifact was trained on; `data` stands in place of its splits, as `split`."""
    from incipit.tasks.task import Task, TaskSpec

    recipe = recipe_of(artifact)
    alike = ("kind", "input", "words", "choices")
    if any(first_of(artifact).task.get(key) != artifact.task.get(key) for key in alike):
        recipe = None  # an ensemble of sources on a task of its own
    if not data:
        if recipe is None:
            raise ArtifactError(
                f"the card of {artifact.place!r} names no data; give --data FILE, or --task NAME"
            )
        return recipe.load_task()
    form = artifact.task
    spec = recipe.spec if recipe is not None else TaskSpec(
        form.get("name") or artifact.name, form["kind"], form.get("input", ""), labels=form.get("words", ()),
        choices=form.get("choices", ()), metrics=form.get("metrics", ()),
    )  # fmt: skip
    if spec.demonstrations:
        raise DataError(
            f"prompt {artifact.name!r} puts {spec.demonstrations} training examples before an input, so "
            "--data is not enough; name a task file that holds both with --task"
        )
    changes: dict[str, Any] = {"train": "", "validation": "", "test": "", "split": {}, "shots": 0, "limit": 0}
    return Task.load(dataclasses.replace(spec, **(changes | {"streaming": False, split: data})))
