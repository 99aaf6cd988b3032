"""What is wrong with a study's file, each as "path: what; do"; the recipes that it makes are judged by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from incipit.errors import RecipeError, nearest

AXES = ("task", "backbone", "method")
HOMES = {"task": "tasks", "backbone": "backbones", "method": "methods", "shift": "tasks"}
TABLES = ("base", "backbones", "tasks", "methods", "experiments")  # each a table of tables
TOP = ("title", *TABLES)
BACKBONE = ("name", "parameters", "pretrain", "after", "set", "dtype", "sentinel")
EXPERIMENT = (*AXES, "axes", "seeds", "set", "shift", "about")


class Needed(dict[str, Any]):
    """A table of a study's files, whose reader is told which key it lacks: RecipeError."""

    def __init__(self, table: Mapping[str, Any], where: str) -> None:
        super().__init__(table)
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise RecipeError(f"{self.where} lacks {key!r}: write it there, see docs/studies.md")


def problems(table: Mapping[str, Any]) -> list[str]:
    """All of them; the shapes first, for the other rules read into the tables."""
    found = [f"{key}: unknown key{nearest(key, TOP)}" for key in table if key not in TOP]
    if shapes := [*_shapes(table)]:
        return found + shapes
    for name, backbone in table.get("backbones", {}).items():
        found += _unknown(f"backbones.{name}", backbone, BACKBONE)
    for name, experiment in table.get("experiments", {}).items():
        found += _unknown(f"experiments.{name}", experiment, EXPERIMENT)
        for axis in HOMES:
            found += _labels(f"experiments.{name}.{axis}", axis, experiment.get(axis), table)
        found += _axes(f"experiments.{name}", experiment)
    return found


def _shapes(table: Mapping[str, Any]) -> Iterator[str]:
    for key in TABLES:
        whole = table.get(key, {})
        if not isinstance(whole, Mapping):
            yield f"{key}: {whole!r} is no table; write [{key}.NAME]"
            continue
        for name, own in whole.items():
            if not isinstance(own, Mapping):
                yield f"{key}.{name}: {own!r} is no table; write [{key}.{name}]"


def _unknown(path: str, table: Mapping[str, Any], known: tuple[str, ...]) -> Iterator[str]:
    yield from (f"{path}.{key}: unknown key{nearest(key, known)}" for key in table if key not in known)


def _labels(path: str, axis: str, labels: Any, table: Mapping[str, Any]) -> Iterator[str]:
    """Of an experiment's task, backbone, method or shift. A backbone may be a template over the other axes."""
    home = HOMES[axis]
    known = list(table.get(home, {}))
    if labels is None:
        if axis in ("task", "backbone") or (axis == "method" and "prompt" not in known):
            yield f"{path}: missing; name some of [{home}] in a list"
    elif not isinstance(labels, list):
        if axis != "backbone" or not isinstance(labels, str):
            yield f"{path}: {labels!r} is no list; write names of [{home}] in square brackets"
    else:
        yield from (
            f"{path}: {one!r} is not in [{home}]{nearest(str(one), known)}"
            for one in labels
            if one not in known
        )


def _axes(path: str, experiment: Mapping[str, Any]) -> Iterator[str]:
    """Of an experiment: axis -> label -> changes."""
    axes = experiment.get("axes", {})
    for name, labels in axes.items() if isinstance(axes, Mapping) else [("", axes)]:
        whole = isinstance(labels, Mapping) and all(isinstance(one, Mapping) for one in labels.values())
        if not whole:
            where = f"{path}.axes.{name}" if name else f"{path}.axes"
            yield f'{where}: {labels!r}; write a table of changes for each label, as 5 = {{ "prompt.length" = 5 }}'
