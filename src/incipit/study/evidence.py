"""Evidence: how a rule reads points, side by side or along an axis, and how its numbers are told.

"±" is a standard error over seeds. Scores and their differences are told in percent and points, other numbers as they
are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from incipit.study.points import Estimate, Points, estimate, mean_of

HOLDS, FAILS, UNSEEN, NOT_RUN = "holds", "fails", "not visible here", "not run"
VERDICTS = (HOLDS, FAILS, UNSEEN, NOT_RUN)
Judged: TypeAlias = tuple[str, str]  # verdict, evidence
Claimed: TypeAlias = Mapping[str, Any]
Found: TypeAlias = dict[tuple[str, ...], list[float]]  # coordinates -> one number a seed
NOTHING: Judged = (NOT_RUN, "no records")
SCORES = ("test", "validation", "member", "shift")  # what begins so is a share of 1


def what_of(claim: Claimed) -> str:
    """The number that a claim is about."""
    return str(claim.get("what", "test"))


def paired(
    claim: Claimed, points: Points, where: Mapping[str, str], what: str = "", without: str = ""
) -> tuple[Found, Found]:
    """Numbers at left and at right of points that agree in every other coordinate, keyed by these but for `without`."""
    sides = []
    for side in ("left", "right"):
        chosen = {**claim.get("where", {}), **where, **claim[side]}
        values: Found = {}
        for point in points.of_experiment(claim["experiment"]):
            at, numbers = point.place.coordinates, point.numbers(what or what_of(claim))
            if numbers and all(at.get(axis) == label for axis, label in chosen.items()):
                rest = (label for axis, label in at.items() if axis not in claim[side] and axis != without)
                values[tuple(rest)] = numbers
        sides.append(values)
    both = [key for key in sides[0] if key in sides[1]]
    return {k: sides[0][k] for k in both}, {k: sides[1][k] for k in both}


def along(claim: Claimed, points: Points, labels: Sequence[str]) -> list[list[list[float]]]:
    """The numbers at each label of the axis `along`, of the settings where every label was run; [] without one."""
    axis, sides = claim["along"], []
    for label in labels:
        side: Found = {}
        for point in points.of_experiment(claim["experiment"]):
            at, numbers = point.place.coordinates, point.numbers(what_of(claim))
            wanted = {**claim.get("where", {}), axis: label}
            if numbers and all(at.get(a) == value for a, value in wanted.items()):
                side[tuple(value for a, value in at.items() if a != axis)] = numbers
        sides.append(side)
    common = [key for key in sides[0] if all(key in side for side in sides)]
    return [[side[key] for key in common] for side in sides] if common else []


def labels_of(points: Points, experiment: str, axis: str) -> list[str]:
    """Labels of an axis, in the study's order."""
    return list(dict.fromkeys(p.place.coordinates[axis] for p in points.of_experiment(experiment)))


def incomplete(claim: Claimed, points: Points) -> Judged:
    """Not run: in part, or at all."""
    any_run = any(point.rows for point in points.of_experiment(claim["experiment"]))
    return (NOT_RUN, "not every setting was run") if any_run else NOTHING


def plain(what: str) -> bool:
    """Whether a number is told as it is, not in percent."""
    return what.partition(".")[0].partition(":")[0] not in SCORES


def number(value: float, what: str) -> str:
    """A score in percent, another number as it is."""
    return f"{value:.3g}" if plain(what) else f"{100 * value:.1f}"


def gap(found: Estimate, what: str) -> str:
    """ "+20.0 ± 1.4 points", the error after the sign. Of a single seed no error is known."""
    error = "unknown" if math.isinf(found.error) else number(found.error, what)
    if plain(what):
        return f"{found.value:+.3g} ± {error}"
    return f"{100 * found.value:+.1f} ± {error} points"


def each(labels: Sequence[str], groups: Sequence[Sequence[Sequence[float]]], what: str) -> str:
    """ "20: 84.6 ± 0.8" for each label; of a single seed the number alone."""
    told = []
    for label, group in zip(labels, groups, strict=True):
        error = estimate((1.0, group)).error
        spread = "" if math.isinf(error) else f" ± {number(error, what)}"
        told.append(f"{label}: {number(mean_of(group), what)}{spread}")
    return ", ".join(told)


def named(where: Mapping[str, str]) -> str:
    """A side of a claim by its labels."""
    return ", ".join(where.values())
