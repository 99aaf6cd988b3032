"""Study: a folder of TOML files -> cells, each one recipe (or one baseline) at one point of an experiment.

    study = Study.read("lester2021", scale="small", data="data")
    study.places()[0].coordinates   # {"task": "trec", "backbone": "minilm", "method": "prompt", "length": "1"}

    studies/NAME/study.toml       title and experiments' figures, for the report
                 SCALE.toml       [base], [backbones], [tasks], [methods], [experiments]
                 published.toml   the paper's numbers, each with its source
                 claims.toml      what is claimed, and the rule that judges it

A cell is known by its key: the hash of everything that its result depends on, without places on this machine. So a
cell that two experiments share is run once, and a record is never read for other settings than its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from incipit import files
from incipit.errors import RecipeError, nearest
from incipit.recipe import Recipe
from incipit.study import checks
from incipit.tasks.spec import TaskSpec
from incipit.train.trainee import FREE

DOES = ("tune", "few-shot", "ensemble", "start")
PLACES = ("data", "train", "validation", "test")  # of a task: where, not what


@dataclass(frozen=True)
class Cell:
    """One thing to run. key: hash of its settings. shift: further tasks that its result is scored on.

    match: the cell whose score on validation it is to meet, seed by seed; its nearest checkpoint is kept, not its best.
    source: the cell from whose prompt it starts, seed by seed.
    """

    key: str
    name: str
    do: str
    recipe: Recipe
    backbone: str
    shots: int = 0
    shift: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    match: Cell | None = None
    source: Cell | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds that it is run with."""
        return tuple(self.recipe.train.seeds)

    def cost(self, parameters: float) -> float:
        """What it takes, in units that are alike for all cells: rows read times size of the backbone."""
        train = self.recipe.train
        rows = 200 if self.do in ("few-shot", "start") else train.steps * train.batch
        length = self.recipe.prompt.length if self.recipe.prompt.kind == "input" else 0
        return rows * len(self.seeds) * (40 + length) * max(parameters, 1.0)


@dataclass(frozen=True)
class Place:
    """Where a cell stands in an experiment: axis -> label."""

    experiment: str
    coordinates: Mapping[str, str]
    cell: Cell


@dataclass(frozen=True)
class Study:
    """One scale of a study, as its files say it."""

    folder: Path
    scale: str
    table: Mapping[str, Any]
    data: str
    overrides: Sequence[str] = ()

    @classmethod
    def read(
        cls, name: str, scale: str = "small", data: files.PathLike = "data", overrides: Sequence[str] = ()
    ) -> Study:
        """From studies/NAME below the present folder, or from a folder; `overrides` change every recipe.

        Raises RecipeError for an unknown study or scale, and for keys that no study has.
        """
        folder = located(name)
        path = folder / f"{scale}.toml"
        if not files.exists(path):
            known = [p.stem for p in folder.glob("*.toml") if "experiments" in files.read_toml(p)]
            raise RecipeError(f"study {name!r} has no scale {scale!r}{nearest(scale, known)}")
        table = files.read_toml(path)
        if problems := checks.problems(table):
            raise RecipeError(f"{path}: {len(problems)} problem(s):\n  " + "\n  ".join(problems))
        return cls(folder, scale, table, str(data), tuple(overrides))

    @property
    def experiments(self) -> Mapping[str, Mapping[str, Any]]:
        """Name -> its table."""
        return dict(self.table.get("experiments", {}))

    def parameters(self, backbone: str) -> float:
        """Declared size of a backbone, for order and cost; records hold the counted one."""
        return float(self.table["backbones"][backbone].get("parameters", 0))

    def chosen(self, only: Sequence[str] = ()) -> list[str]:
        """Names of the experiments, or those of `only`; RecipeError for an unknown one."""
        for name in only:
            if name not in self.experiments:
                raise RecipeError(f"the study has no experiment {name!r}{nearest(name, self.experiments)}")
        return list(only) or list(self.experiments)

    def places(self, only: Sequence[str] = ()) -> list[Place]:
        """Every cell of the experiments, in their order. Raises RecipeError where a combination is no recipe."""
        return [place for name in self.chosen(only) for place in self._places[name]]

    @cached_property
    def _places(self) -> dict[str, list[Place]]:
        return {name: list(self._of(name, table)) for name, table in self.experiments.items()}

    def _of(self, name: str, table: Mapping[str, Any]) -> Iterator[Place]:
        backbones = table["backbone"]
        axes: dict[str, Mapping[str, Any]] = {
            "task": {t: self.table["tasks"][t].get("set", {}) for t in table["task"]}
        }
        if not isinstance(backbones, str):
            axes["backbone"] = {label: {} for label in backbones}
        axes["method"] = {m: self.table["methods"][m] for m in table.get("method", ["prompt"])}
        axes |= table.get("axes", {})
        shift = {t: self._task(t) for t in table.get("shift", ())}
        for labels in itertools.product(*axes.values()):
            coordinates = dict(zip(axes, labels, strict=True))
            yield Place(name, coordinates, self._at(name, coordinates, axes, shift))

    def _at(
        self,
        name: str,
        coordinates: Mapping[str, str],
        axes: Mapping[str, Mapping[str, Any]],
        shift: Mapping[str, Any],
        backbone: str = "",
    ) -> Cell:
        """The cell of an experiment at these labels of its axes. backbone: in place of the experiment's."""
        table, own = self.experiments[name], "/".join([name, *coordinates.values()])
        mixed = "mixture" in axes["method"][coordinates["method"]]
        if mixed:  # one model for all tasks: one cell, which each of their places shares
            own = "/".join([name, *({**coordinates, "task": "+".join(table["task"])}.values())])
        changes: dict[str, Any] = {}
        for axis, label in coordinates.items():
            changes |= {} if mixed and axis == "task" else axes[axis][label]
        changes |= table.get("set", {})
        if "seeds" in table:
            changes["train.seeds"] = table["seeds"]
        backbones, match = table["backbone"], str(changes.pop("match", ""))
        label = backbone or (
            _filled(own, backbones, coordinates) if isinstance(backbones, str) else coordinates["backbone"]
        )
        own = f"{own}@{backbone}" if backbone else own
        if label not in self.table["backbones"]:
            raise RecipeError(
                f"{own}: {label!r} is not in [backbones]{nearest(label, self.table['backbones'])}"
            )
        source = changes.pop("source", None)
        begun = None if source is None else self._source(own, name, source, coordinates, axes)
        tasks = table["task"] if mixed else [coordinates["task"]]
        if not match:
            return self._cell(own, tasks, label, changes, shift, source=begun)
        if match not in self.table["methods"] or match == coordinates["method"]:
            raise RecipeError(
                f"{own}: match = {match!r} is no other of [methods]{nearest(match, self.table['methods'])}"
            )
        known = {**axes, "method": {match: self.table["methods"][match]}}
        partner = self._at(name, {**coordinates, "method": match}, known, shift)
        return self._cell(own, tasks, label, changes, shift, partner, begun)

    def _source(
        self,
        own: str,
        name: str,
        source: Any,
        coordinates: Mapping[str, str],
        axes: Mapping[str, Mapping[str, Any]],
    ) -> Cell:
        """The cell from whose prompt another starts: the same but for the labels that `source` names."""
        if not isinstance(source, Mapping) or not all(isinstance(label, str) for label in source.values()):
            raise RecipeError(f'{own}: source = {source!r} is no table of labels, as {{ task = "sst2" }}')
        own_axes = {**axes, "task": {t: table.get("set", {}) for t, table in self.table["tasks"].items()}}
        known = {**own_axes, "backbone": self.table["backbones"]}
        for axis, label in source.items():
            if label not in known.get(axis, {}):
                near = nearest(label, known[axis]) if axis in known else nearest(axis, known)
                raise RecipeError(f"{own}: source: there is no {axis} = {label!r} here{near}")
        there = {**coordinates, **{axis: label for axis, label in source.items() if axis != "backbone"}}
        if again := [axis for axis, label in there.items() if "source" in own_axes[axis][label]]:
            raise RecipeError(
                f"{own}: source: starts from a prompt itself; name another label of {again[0]} in it"
            )
        return self._at(name, there, own_axes, {}, source.get("backbone", ""))

    def _task(self, label: str) -> dict[str, Any]:
        """The [task] table of a task, with the data folder written in."""
        task = {k: v for k, v in self.table["tasks"][label].items() if k != "set"}
        return {
            k: v.replace("{data}", self.data) if k in PLACES and isinstance(v, str) else v
            for k, v in task.items()
        }

    def _cell(
        self,
        name: str,
        tasks: Sequence[str],
        label: str,
        changes: Mapping[str, Any],
        shift: Mapping[str, Any],
        match: Cell | None = None,
        source: Cell | None = None,
    ) -> Cell:
        changes = dict(changes)
        mixture = changes.pop("mixture", None)
        do, shots = str(changes.pop("do", "tune")), int(changes.pop("shots", 0))
        if do not in DOES:
            raise RecipeError(f"{name}: do = {do!r} is unknown{nearest(do, DOES)}")
        backbone = self.table["backbones"][label]
        changes = dict(backbone.get("set", {})) | changes
        base: dict[str, Any] = {k: dict(v) for k, v in self.table.get("base", {}).items()}
        named = {"name": backbone.get("name", label)} | {
            k: backbone[k] for k in ("dtype", "sentinel") if k in backbone
        }
        table = base | {
            "name": re.sub(r"[^A-Za-z0-9._-]+", "-", name),
            "backbone": base.get("backbone", {}) | named,
            "task": self._task(tasks[0]),
        }
        if mixture is not None:
            table["task"] |= {"name": tasks[0]}
            table["mixture"] = {**mixture, "tasks": {t: self._task(t) for t in tasks[1:]}}
        for path, value in changes.items():
            outer, _, inner = path.partition(".")
            table.setdefault(outer, {})
            table[outer] = {**table[outer], inner: value}
        if do == "few-shot":  # the recipe stands for task, backbone and decoding; nothing is trained
            table["prompt"] = {"kind": "none"}
            table["train"] = {"method": "model", "seeds": table.get("train", {}).get("seeds", [0])}
        recipe = Recipe.of(table, self.overrides, source=f"{self.folder / self.scale}.toml, {name}")
        key = files.sha256_json(
            [_lasting(recipe, do, shots), self.origin(label), _placeless(shift) if do != "few-shot" else {}]
            + ([] if match is None else [match.key])
            + ([] if source is None else [{"source": source.key}])
        )
        return Cell(key, name, do, recipe, label, shots, shift if do != "few-shot" else {}, match, source)

    def origin(self, backbone: str) -> Any:
        """What a backbone is, whatever its place: its name, or the recipes that pre-train it, one after another."""
        table = self.table["backbones"][backbone]
        if "pretrain" not in table:
            return table.get("name", backbone)
        told = ("start", "blocks") if "after" in table else ()  # where that one is, on this machine
        recipe = files.read_toml(self.folder / table["pretrain"])
        own = files.sha256_json({k: v for k, v in recipe.items() if k not in told})
        return [own, self.origin(table["after"])] if "after" in table else [own]


def _filled(where: str, template: str, coordinates: Mapping[str, str]) -> str:
    """The name of a backbone, of a template over the other axes."""
    try:
        return template.format(**coordinates)
    except (KeyError, IndexError, ValueError) as error:
        raise RecipeError(
            f"{where}: backbone = {template!r} is no template over {', '.join(coordinates)} ({error}); write a list of "
            "[backbones], or an axis in braces"
        ) from error


def _lasting(recipe: Recipe, do: str, shots: int) -> dict[str, Any]:
    """What of a recipe its result depends on, without names and places."""
    table = recipe.table()
    own = {"do": do, "task": _told(recipe.spec), "decode": table["decode"]} | {
        k: table["backbone"][k] for k in ("dtype", "sentinel")
    }
    if do == "few-shot":
        return own | {"shots": shots, "layout": table["prompt"]["layout"]}
    if recipe.mixture is not None:  # the names too: they may stand before the inputs
        own["mixture"] = {k: v for k, v in table["mixture"].items() if k != "tasks"} | {
            "tasks": {name: _told(spec) for name, spec in recipe.mixed.items()}
        }
    train = {k: v for k, v in table["train"].items() if k not in (*FREE, "seeds")}
    seeds = {"seeds": table["train"]["seeds"]} if do == "ensemble" else {}
    return own | {"train": train, "prompt": table["prompt"]} | seeds


def _told(spec: TaskSpec) -> dict[str, Any]:
    """A task without names and places."""
    apart = (*PLACES, "name", "description", "license")
    return {k: v for k, v in dataclasses.asdict(spec).items() if k not in apart}


def _placeless(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: {k: v for k, v in table.items() if k not in PLACES} for name, table in tables.items()}


def located(name: str) -> Path:
    """The folder of a study: a path, or studies/NAME below the present folder."""
    for folder in (Path(name), Path("studies") / name):
        if files.exists(folder / "study.toml"):
            return folder
    known = sorted(p.parent.name for p in Path("studies").glob("*/study.toml"))
    hint = nearest(name, known) or "; run it where the folder studies/ is, or give the study's folder"
    raise RecipeError(f"there is no study {name!r}{hint}")
