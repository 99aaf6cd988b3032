"""Records -> points of the experiments; only rows of present settings, and of one data set and one backbone each.

    points = Points.of(study, rows)
    points.values("length", {"length": "20"}, "test")   # {("trec", "minilm", "prompt", "20"): [0.81, 0.79, 0.80]}

`what` names a number of a row: a split ("test": THE metric), "test.legal_rate", "shift:imdb", "extra.norm", "seconds",
"parameters".
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from incipit.study.grid import score
from incipit.study.plan import Place, Study

Row: TypeAlias = Mapping[str, Any]
VOTED = -1  # the seed of a row that is no run but the vote of all


@dataclass(frozen=True)
class Point:
    """One place of the grid with its rows, a seed each; [] where nothing was run."""

    place: Place
    rows: tuple[Row, ...]

    def numbers(self, what: str) -> list[float]:
        """One number a seed; of a vote the one. What a row lacks is left out."""
        if self.place.cell.recipe.mixture is not None:
            what = self._of_mixture(what)
        voted = self.place.cell.do == "ensemble" and not what.startswith("member.")
        kept = [row for row in self.rows if (row["seed"] == VOTED) == voted]
        found = [number(row, what.removeprefix("member.")) for row in kept]
        return [value for value in found if value is not None]

    def _of_mixture(self, what: str) -> str:
        """The name of this task's own number, where a row has numbers of several tasks."""
        outer, _, inner = what.partition(".")
        if outer not in ("test", "validation"):
            return what
        task = self.place.coordinates["task"]
        return f"{outer}.{task}.{inner or self.place.cell.recipe.mixed[task].metric_names()[0]}"


def number(row: Row, what: str) -> float | None:
    """A number of a row by its name; None where it has none."""
    outer, _, inner = what.partition(".")
    if not inner:
        value = score(row, what) if what in row["scores"] or what == "test" else row.get(what)
    elif outer == "extra":
        value = row["extra"].get(inner)
    else:
        split = "validation" if outer == "test" and "test" not in row["scores"] else outer
        value = row["scores"].get(split, {}).get(inner)
    return float(value) if isinstance(value, (int, float)) else None


class Points:
    """All places of a study with what is known of them. aside: rows that do not count, by reason."""

    def __init__(self, points: Sequence[Point], aside: Mapping[str, int]) -> None:
        self.points, self.aside = list(points), dict(aside)

    @classmethod
    def of(cls, study: Study, rows: Sequence[Row], only: Sequence[str] = ()) -> Points:
        """The places of `study`; rows of other settings, or of older data and backbones, are counted and left aside."""
        places = study.places(only)
        keys = {place.cell.key: place for place in study.places()}
        mine = [row for row in rows if row["settings"].get("cell") in keys]
        aside = {"other settings": len(rows) - len(mine)}
        mine = sorted(mine, key=lambda row: str(row["provenance"]["time"]))
        data: dict[str, str] = {}
        prints: dict[str, Any] = {}
        for row in mine:  # the newest says what the data is
            coordinates = keys[row["settings"]["cell"]].coordinates
            for split, digest in row["data"].items():
                data[_task_of(coordinates, split)] = digest
            prints[row["backbone"]["name"]] = row["backbone"]["fingerprint"]
        kept: dict[str, dict[int, Row]] = {}
        for row in mine:
            coordinates = keys[row["settings"]["cell"]].coordinates
            same = all(data[_task_of(coordinates, s)] == digest for s, digest in row["data"].items())
            reason = "" if same else "other data"
            reason = reason or (
                ""
                if prints[row["backbone"]["name"]] == row["backbone"]["fingerprint"]
                else "another backbone"
            )
            if reason:
                aside[reason] = aside.get(reason, 0) + 1
                continue
            kept.setdefault(row["settings"]["cell"], {})[row["seed"]] = row
        points = []
        for place in places:
            wanted = {*place.cell.seeds, VOTED}
            found = kept.get(place.cell.key, {})
            points.append(Point(place, tuple(found[s] for s in sorted(found) if s in wanted)))
        return cls(points, {k: v for k, v in aside.items() if v})

    def of_experiment(self, name: str) -> list[Point]:
        """The points of one experiment, in its order."""
        return [p for p in self.points if p.place.experiment == name]

    def values(
        self, experiment: str, where: Mapping[str, str], what: str = "test"
    ) -> dict[tuple[str, ...], list[float]]:
        """Coordinates -> numbers of the points at `where` that have any."""
        found = {}
        for point in self.of_experiment(experiment):
            coordinates = point.place.coordinates
            if all(coordinates.get(axis) == label for axis, label in where.items()):
                numbers = point.numbers(what)
                if numbers:
                    found[tuple(coordinates.values())] = numbers
        return found

    @property
    def run(self) -> int:
        """Places with at least one row."""
        return sum(bool(point.rows) for point in self.points)

    def rows(self) -> list[Row]:
        """Every row that counts, once."""
        seen = {(row["settings"]["cell"], row["seed"]): row for point in self.points for row in point.rows}
        return list(seen.values())


def _task_of(coordinates: Mapping[str, str], split: str) -> str:
    """What a data hash is of: a task of the study, whether alone or in a mixture, or a shifted test."""
    return f"task:{coordinates['task']}" if split == "task" else split


# Student's t, 97.5 % (two-sided 95 %), of 1, 2, ... degrees of freedom; the last of more, too
T = [
    12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09
]  # fmt: skip
Groups: TypeAlias = Sequence[Sequence[float]]  # a setting, its numbers: one a seed


@dataclass(frozen=True)
class Estimate:
    """A weighted sum of means over settings. error: its standard error over seeds; reach: half its 95 % interval."""

    value: float
    error: float
    reach: float

    @property
    def seen(self) -> bool:
        """Whether zero lies outside the interval."""
        return abs(self.value) > max(self.reach, 1e-9)  # sums of equal numbers differ in their last bits


def estimate(*terms: tuple[float, Groups]) -> Estimate:
    """Sum of w_j x the mean of group means, seeds drawn apart: error² = sum of w² s²/n / (number of groups)².

    The interval is Student's, its degrees of freedom Welch and Satterthwaite's, rounded down: of three seeds a side
    that spread alike 2.78 errors, not 2. It is infinite where a group is a single seed.
    """
    value = sum(weight * mean_of(groups) for weight, groups in terms)
    parts, bound = [], 0.0
    for weight, groups in terms:
        for group in groups:
            if len(group) < 2:
                return Estimate(value, math.inf, math.inf)
            part = (weight / len(groups)) ** 2 * statistics.variance(group) / len(group)
            parts.append(part)
            bound += part**2 / (len(group) - 1)
    error = math.sqrt(sum(parts))
    free = int(sum(parts) ** 2 / bound + 1e-9) if bound else len(T)
    return Estimate(value, error, error * T[max(1, min(free, len(T))) - 1])


def mean_of(groups: Iterable[Sequence[float]]) -> float:
    """Mean of the groups' means: each point counts once, whatever its number of seeds."""
    return statistics.fmean(statistics.fmean(group) for group in groups)
