"""Recipe: every choice of one run, in names and numbers; frozen, read from and written as TOML.

    name = "mood"
    [backbone]
    name = "builtin:minilm"
    [prompt]
    length = 8
    [task]
    builtin = "reviews"

All problems are listed at once, each as "path: what; got; do". Nothing here loads torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError

from incipit import files
from incipit.errors import DataError, RecipeError, nearest
from incipit.recipe.clashes import clashes
from incipit.recipe.problems import listed, overridden, plain, worded
from incipit.recipe.tables import (
    BackboneTable,
    DecodeTable,
    EnsembleTable,
    MixtureTable,
    PromptTable,
    Table,
    TrainTable,
    TransferTable,
)
from incipit.tasks import catalogue
from incipit.tasks.task import Task, TaskSpec, builtin


class Recipe(Table):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the artifact; also of its folder, so letters, digits, dots, dashes and underscores."""
    backbone: BackboneTable = BackboneTable()
    prompt: PromptTable = PromptTable()
    task: Mapping[str, Any]
    """The keys of a TaskSpec, or builtin = "NAME", or form = "NAME" with data = "FOLDER", and the keys that differ."""
    train: TrainTable = TrainTable()
    decode: DecodeTable = DecodeTable()
    mixture: MixtureTable | None = None
    ensemble: EnsembleTable | None = None
    transfer: TransferTable | None = None

    _base: str = PrivateAttr(default="")
    _spec: TaskSpec = PrivateAttr()
    _mixed: dict[str, TaskSpec] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(
        cls,
        table: Mapping[str, Any],
        overrides: Sequence[str] = (),
        base: files.PathLike = "",
        source: str = "the recipe",
    ) -> Recipe:
        """From tables and "a.b=value" texts; raises one RecipeError that lists every problem.

        base: the folder that relative paths of the task start from. source: what the error calls the recipe.
        """
        merged, problems = overridden(table, overrides)
        problems += [*_unplaced(merged)]
        known = {key: value for key, value in merged.items() if key in cls.model_fields}
        spec = None
        if "task" not in known:
            move = 'write [task] with builtin = "reviews" or your data'
            problems.append(f"task: missing; got no [task] table; {move}")
            known["task"] = {}
        elif isinstance(known["task"], Mapping):
            if not {"builtin", "form"} & set(known["task"]):  # one name will do
                known["task"] = {"name": known.get("name", "run"), **known["task"]}
            spec, wrong = _task(known["task"])
            problems += wrong
        specs, wrong = _mixed(known.get("mixture"))
        problems += wrong
        broken: set[str] = set()
        try:
            made = cls.model_validate(known)
        except ValidationError as error:
            problems += worded(error, cls)
            broken = {str(one["loc"][0]) for one in error.errors()}
            made = cls.model_validate({k: v for k, v in known.items() if k not in broken} | {"task": {}})
        made = _defaulted(made, spec)
        problems += clashes(made, spec, broken)
        if problems:
            raise RecipeError(listed(problems, source))
        assert spec is not None
        made._base, made._spec = str(base), spec
        made._mixed = {spec.name: spec, **specs} if made.mixture is not None else {}
        return made

    @classmethod
    def read(cls, path: files.PathLike, overrides: Sequence[str] = ()) -> Recipe:
        """From a TOML file; relative paths of its task start at its folder."""
        return cls.of(files.read_toml(path), overrides, Path(path).parent, str(path))

    def varied(self, changes: Mapping[str, Any], source: str = "the recipe") -> Recipe:
        """The same recipe with other values at some keys ("train.lr"), checked anew.

        The defaults that follow other choices (prompt.start, and train.lr of model tuning) follow them again.
        """
        table = self.table()
        plain = _defaulted(Recipe(task=self.task, train=TrainTable(method=self.train.method)), self.spec)
        for name, key in (("prompt", "start"), ("train", "lr")):
            if table[name][key] == getattr(getattr(plain, name), key):
                del table[name][key]
        for path, value in changes.items():
            *outer, last = path.split(".")
            inner = table
            for key in outer:
                inner = inner.setdefault(key, {})
            inner[last] = value
        return Recipe.of(table, (), self._base, source)

    @property
    def base(self) -> str:
        """The folder that relative paths of the task start from; "": where the process runs."""
        return self._base

    @property
    def spec(self) -> TaskSpec:
        """The task's definition, of a built-in task with the recipe's changes."""
        return self._spec

    def load_task(self) -> Task:
        """The task itself; its data is read when it is asked for."""
        return self._loaded(self.task, self._spec)

    def _loaded(self, table: Mapping[str, Any], spec: TaskSpec) -> Task:
        if "builtin" in table:
            changes = {key: value for key, value in table.items() if key != "builtin"}
            return builtin(table["builtin"], base=self._base, **changes)
        return Task.load(spec, base=self._base or None)

    @property
    def mixed(self) -> Mapping[str, TaskSpec]:
        """The definitions of a mixture's tasks by name, the recipe's own first; {} without a mixture."""
        return self._mixed

    def load_mixed(self) -> dict[str, Task]:
        """The tasks of a mixture by name; {} without one."""
        if self.mixture is None:
            return {}
        tables = {self._spec.name: self.task, **self.mixture.tasks}
        return {name: self._loaded(tables[name], spec) for name, spec in self._mixed.items()}

    def table(self) -> dict[str, Any]:
        """All choices, defaults included, as JSON and TOML can hold them; `Recipe.of` reads it back."""
        return self.model_dump(mode="json", exclude_none=True)

    def toml(self) -> str:
        """The text of a recipe file."""
        return files.dump_toml(self.table())


def _unplaced(table: Mapping[str, Any]) -> list[str]:
    """Problems of top-level keys that no recipe has; a key of a table is shown its table."""
    found = []
    for key in table:
        if key in Recipe.model_fields:
            continue
        tables = {n: f.annotation for n, f in Recipe.model_fields.items() if n not in ("name", "task")}
        homes = [n for n, t in tables.items() if key in getattr(plain(t), "model_fields", {})]
        homes += ["task"] if key in TaskSpec.__dataclass_fields__ else []
        hint = f"; did you mean {homes[0] + '.' + key!r}?" if homes else nearest(key, Recipe.model_fields)
        found.append(f"{key}: unknown key{hint}")
    return found


def _mixed(table: Any) -> tuple[dict[str, TaskSpec], list[str]]:
    """The TaskSpecs of a [mixture] table by name, and their problems."""
    tasks = table.get("tasks") if isinstance(table, Mapping) else None
    specs: dict[str, TaskSpec] = {}
    problems: list[str] = []
    for name, own in tasks.items() if isinstance(tasks, Mapping) else ():
        if isinstance(own, Mapping):
            spec, wrong = _task({**own, "name": name}, f"mixture.tasks.{name}")
            problems += wrong
            specs |= {name: spec} if spec is not None else {}
    return specs, problems


def _task(table: Mapping[str, Any], path: str = "task") -> tuple[TaskSpec | None, list[str]]:
    """The TaskSpec of a [task] table and its problems; None where there is none to judge further."""
    known = [*TaskSpec.__dataclass_fields__, "builtin", *catalogue.KEYS]
    found = [f"{path}.{key}: unknown key{nearest(key, known)}" for key in table if key not in known]
    try:
        table = catalogue.expanded(table)
    except RecipeError as error:
        return None, [*found, f"{path}.{error}"]
    values = {k: v for k, v in table.items() if k in known and k != "builtin" and v not in ({}, None)}
    spec = TaskSpec(**{"name": "", "kind": ""} | values)
    if "builtin" in table:
        try:
            spec = dataclasses.replace(builtin(str(table["builtin"])).spec, **values)
        except DataError as error:
            return None, [*found, f"{path}.builtin: {error}"]
    wrong = spec.problems()
    return (None if wrong else spec), found + [f"{path}.{problem}" for problem in wrong]


def _defaulted(recipe: Recipe, spec: TaskSpec | None) -> Recipe:
    """The two defaults that depend on other choices, written out."""
    prompt, train = recipe.prompt, recipe.train
    if "start" not in prompt.model_fields_set and spec is not None and spec.kind != "classification":
        prompt = prompt.model_copy(update={"start": "vocabulary"})
    if "lr" not in train.model_fields_set and train.method != "prompt":
        train = train.model_copy(update={"lr": 0.001})
    return recipe.model_copy(update={"prompt": prompt, "train": train})
