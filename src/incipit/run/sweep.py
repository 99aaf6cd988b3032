"""Sweeps: a recipe at every combination of some keys' values, chosen on validation, the best one scored on test.

    swept = sweep([recipe], {"train.lr": [0.03, 0.1], "prompt.length": [5, 20]}, "runs/mood", seeds=range(5))
    swept.best[0].values  # {"train.lr": 0.1, "prompt.length": 20}

Combinations that share a backbone and a schedule train as one bundle, all their seeds together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from incipit import files
from incipit.backbones import Backbone
from incipit.errors import RecipeError
from incipit.recipe import Recipe
from incipit.recipe.sweeps import Combination, combinations, full_key
from incipit.run.bundle import Bundle, ordered, plan
from incipit.run.curves import draw
from incipit.run.members import Tuned
from incipit.tasks.metrics import METRICS
from incipit.train import Outcome

TABLE, FIGURE = "sweep.json", "sweep.png"


@dataclass(frozen=True)
class Spread:
    """mean of the scores of all seeds, and their standard deviation (n - 1; None for a single seed)."""

    mean: float
    deviation: float | None
    each: tuple[float, ...]

    @classmethod
    def of(cls, scores: Sequence[float]) -> Spread:
        """Of the scores of one combination, seed by seed."""
        deviation = statistics.stdev(scores) if len(scores) > 1 else None
        return cls(statistics.fmean(scores), deviation, tuple(scores))


@dataclass(frozen=True)
class Row:
    """One combination. base: the recipe it varies. best: on dev, among those of its recipe and task.

    dev: None without a validation split. test: of the best combination only; the others' test split is not scored.
    """

    name: str
    base: str
    task: str
    values: Mapping[str, Any]
    metric: str
    seeds: tuple[int, ...]
    dev: Spread | None
    test: Spread | None
    best: bool


@dataclass(frozen=True)
class Swept:
    """tuned: every member. rows: every combination. figure: its path, "" without one, and `note` says why."""

    tuned: list[Tuned]
    rows: list[Row]
    figure: str
    note: str

    @property
    def best(self) -> list[Row]:
        """The best combination of each recipe and task."""
        return [row for row in self.rows if row.best]

    def table(self) -> list[dict[str, Any]]:
        """The rows, as JSON can hold them."""
        return [asdict(row) for row in self.rows]


def sweep(
    recipes: Sequence[Recipe],
    over: Mapping[str, Sequence[Any]],
    folder: files.PathLike,
    *,
    seeds: Sequence[int] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    show: bool = True,
    backbone: Backbone | None = None,
) -> Swept:
    """Train every recipe at every combination of `over` (key -> values) with every seed, choose, and compare.

    seeds: in place of those of the recipes. Writes what `tune` writes, the table and a figure below `folder`. A sweep
    that was stopped goes on with `resume`. Raises RecipeError where a combination is no recipe, or where there is
    nothing to choose on.
    """
    cells = cells_of(recipes, over, seeds)
    varied = [cell.recipe for cell in cells]
    bundles = plan(varied, folder, backbone)
    for bundle in bundles:
        bundle.check_places(resume, overwrite)
    outcomes: dict[str, Outcome] = {}
    for bundle in bundles:
        bundle.train(resume=resume, overwrite=overwrite, show=show)
        outcomes |= zip(bundle.names, bundle.outcomes, strict=True)
        if bundle.whole and backbone is None:
            bundle.release()
    best = _best(cells, outcomes, bundles)
    found: list[Tuned] = []
    for bundle in bundles:
        found += bundle.finish(lambda member: member.recipe.name in best)
        if bundle.whole:
            bundle.release()
    tuned = ordered(found, varied)
    rows = [
        _row(cell, [t for t in tuned if t.record["settings"]["name"] == cell.recipe.name], best)
        for cell in cells
    ]
    return _written(Swept(tuned, rows, "", ""), Path(folder))


def cells_of(
    recipes: Sequence[Recipe], over: Mapping[str, Sequence[Any]], seeds: Sequence[int] | None = None
) -> list[Combination]:
    """All combinations of all recipes, checked before anything is trained."""
    if not recipes:
        raise RecipeError("nothing to sweep: give at least one recipe")
    over = {full_key(key): list(values) for key, values in over.items()}
    for key, values in over.items():
        if not values:
            raise RecipeError(f"{key} is swept over no value: give at least one")
    cells = [cell for recipe in recipes for cell in combinations(recipe, over, seeds)]
    for cell in cells:
        spec = cell.recipe.spec
        if len(cells) > len(recipes) and not (spec.validation or "validation" in spec.split):
            raise RecipeError(
                f"{cell.base}: a sweep chooses on validation, which the task {spec.name!r} lacks: "
                "name task.validation, or set task.split.validation=0.1"
            )
    return cells


def _metric(recipe: Recipe) -> str:
    return recipe.spec.metric_names()[0]


def _group(cell: Combination) -> tuple[str, str, str]:
    """What can be compared: combinations of one recipe, on one task by one metric."""
    return cell.base, cell.recipe.spec.name, _metric(cell.recipe)


def _best(
    cells: Sequence[Combination], outcomes: Mapping[str, Outcome], bundles: Sequence[Bundle]
) -> set[str]:
    """Names of the combinations with the best mean dev score of their group; of equals the first."""
    members: dict[str, list[str]] = {}
    for bundle in bundles:
        for (recipe, _), name in zip(bundle.pairs, bundle.names, strict=True):
            members.setdefault(recipe.name, []).append(name)
    found: dict[tuple[str, str, str], tuple[float, str]] = {}
    for cell in cells:
        name = cell.recipe.name
        scores = [s for member in members[name] if (s := outcomes[member].best_score) is not None]
        sign = 1 if METRICS[_metric(cell.recipe)].higher_is_better else -1
        value = sign * statistics.fmean(scores) if scores else 0.0
        value = -math.inf if math.isnan(value) else value
        if _group(cell) not in found or value > found[_group(cell)][0]:
            found[_group(cell)] = value, name
    return {name for _, name in found.values()}


def _row(cell: Combination, tuned: Sequence[Tuned], best: set[str]) -> Row:
    metric = _metric(cell.recipe)

    def spread(split: str) -> Spread | None:
        scores = [t.scores[split][metric] for t in tuned if split in t.scores]
        return Spread.of(scores) if scores else None

    name, seeds = cell.recipe.name, tuple(t.seed for t in tuned)
    dev, test = spread("validation"), spread("test")
    return Row(name, cell.base, cell.recipe.spec.name, cell.values, metric, seeds, dev, test, name in best)


def _written(swept: Swept, folder: Path) -> Swept:
    """The sweep with its table and figure in the folder; one process writes them."""
    if not Accelerator().is_main_process:
        return swept
    curves = {
        row.name: [
            [(int(h["step"]), float(h[row.metric])) for h in t.outcome.history]
            for t in swept.tuned
            if t.record["settings"]["name"] == row.name
        ]
        for row in swept.rows
    }
    figure, note = draw(swept.rows, curves, folder / FIGURE)
    files.write_json(folder / TABLE, swept.table())
    return Swept(swept.tuned, swept.rows, figure, note)
