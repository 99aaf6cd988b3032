"""Paired runs: several methods on the same data with the same seed, and the exact test of two of them.

paired = Paired.of(rows)
paired.differences("pruned", "restart")     # one number for each task and seed in which both were run
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]
Cell: TypeAlias = tuple[tuple[str, ...], int]  # (coordinates, seed)
FINEST = 100_000  # steps of one unit of score that the exact test tells apart


@dataclass(frozen=True)
class Result:
    """One method's THE metric in one cell. extra: what else its row says."""

    cell: Cell
    method: str
    score: float
    extra: Mapping[str, Any]


def results(row: Row) -> Iterator[Result]:
    """Of one record: of `incipit prune`, a result for each prompt that it tested; else for each of extra.methods.

    A gate's controls are results of their own, "adapted-sesom: inputs_shuffled".
    """
    seed = int(row["seed"])
    cell: Cell
    if "rows" in row["extra"]:
        task = row["settings"]["task"]
        cell = (str(task.get("builtin") or task["name"]),), seed
        for one in row["extra"]["rows"]:
            if one["test"]:
                yield Result(cell, one["name"], float(next(iter(one["test"].values()))), row["extra"])
        return
    cell = tuple(str(row["settings"]["cell"]).split("/")), seed
    for method, found in row["extra"]["methods"].items():
        yield Result(cell, method, float(found["score"]), found)
        for name, value in found.get("controls", {}).items():
            if name not in ("sesom", "entropy"):
                yield Result(cell, f"{method}: {name}", float(value), {})


class Paired:
    """All results, one for each method and cell: the newest, where a run was repeated."""

    def __init__(self, found: Iterable[Result]) -> None:
        self.by: dict[str, dict[Cell, Result]] = {}
        for one in found:
            self.by.setdefault(one.method, {})[one.cell] = one

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Paired:
        """Of records, whatever their order."""
        ordered = sorted(rows, key=lambda row: str(row["provenance"]["time"]))
        return cls(one for row in ordered for one in results(row))

    @property
    def places(self) -> list[tuple[str, ...]]:
        """Coordinates in which anything was run; numbers in their order."""
        found = {cell[0] for own in self.by.values() for cell in own}
        return sorted(found, key=lambda at: [(int(x), "") if x.isdigit() else (0, x) for x in at])

    def scores(self, method: str, where: Sequence[str] = ()) -> dict[Cell, float]:
        """Of one method, in the cells whose coordinates include all of `where`."""
        own = self.by.get(method, {})
        return {cell: one.score for cell, one in own.items() if set(where) <= set(cell[0])}

    def differences(self, left: str, right: str, where: Sequence[str] = ()) -> list[float]:
        """left - right in every cell that has both."""
        mine, other = self.scores(left, where), self.scores(right, where)
        return [mine[cell] - other[cell] for cell in sorted(mine) if cell in other]


def flipped(differences: Sequence[float]) -> float:
    """P(|sum of +-d_i| >= |sum of d_i|) over all 2^n choices of signs: the exact paired test, two-sided.

    Fisher's randomisation test. Scores that are shares of whole examples are summed exactly.
    """
    if not differences:
        return 1.0
    exact = [Fraction(d).limit_denominator(2000) for d in differences]
    unit = math.lcm(*(d.denominator for d in exact))
    unit = unit if unit <= FINEST else 10_000
    steps = [round(abs(d) * unit) for d in exact]
    chances = {0: 1.0}  # sum -> share of the sign choices
    for step in steps:
        after: dict[int, float] = {}
        for total, share in chances.items():
            for place in (total - step, total + step):
                after[place] = after.get(place, 0.0) + share / 2
        chances = after
    seen = abs(sum(round(d * unit) for d in exact))
    return min(1.0, sum(share for total, share in chances.items() if abs(total) >= seen))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rho: the correlation of mean ranks; 0 where a side is constant."""
    ranks = [
        [sum(b < a for b in side) + (sum(b == a for b in side) - 1) / 2 for a in side]
        for side in (one, other)
    ]
    means = [sum(side) / len(side) for side in ranks]
    apart = [[r - m for r in side] for side, m in zip(ranks, means, strict=True)]
    size = math.sqrt(sum(a * a for a in apart[0]) * sum(b * b for b in apart[1]))
    return sum(a * b for a, b in zip(*apart, strict=True)) / size if size else 0.0


def overlap(tables: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean Jaccard index of the better half of the tokens of every two score tables, and the same at chance."""
    found, chance = [], []
    for one, other in combinations(tables, 2):
        count, half = len(one), len(one) // 2
        best = [set(sorted(range(count), key=lambda i, s=side: -s[i])[:half]) for side in (one, other)]  # type: ignore[misc]
        both = len(best[0] & best[1])
        found.append(both / (2 * half - both))
        expected = half * half / count
        chance.append(expected / (2 * half - expected))
    return sum(found) / len(found), sum(chance) / len(chance)
