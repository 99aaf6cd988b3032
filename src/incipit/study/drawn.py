"""Drawn: the points of an experiment -> its figures: scores along an axis, their mean over tasks, trained numbers.

x = ["size", "length"]     of the axes named in a section's `x`, the first that the experiment has
share = ["kinds", "size"]  experiments whose trained numbers are drawn as a share of the model
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from incipit.study import figures
from incipit.study.page import Block, Figure
from incipit.study.points import Point

ELSEWHERE = "tested on"  # an axis of figures: the own test, then the shifted ones
UNORDERED = (ELSEWHERE, "task", "method", "start", "population", "placement")  # no line joins their places
SCORE = "score on test, %"
Series = dict[str, list[tuple[str, list[float]]]]


def scores(section: Mapping[str, Any], name: str, whole: Sequence[Point]) -> list[Block]:
    """One figure for each task: score along the axis, a line for each label of the other axes that vary.

    whole: all points of the experiment, run or not, in the study's order, which is that of the axis. Of several tasks
    also the mean. x = "tested on": the own test beside the shifted ones. x = "task": all tasks in one figure.
    """
    mine = [p for p in whole if p.numbers("test")]
    x = _axis(section, whole)
    if not x or not mine:
        return []
    title = str(section["title"])
    if len(section["experiments"]) > 1:
        title += f", {name}"
    if x == "task":
        found = _series(mine, x)
        return _figure(f"{name}-tasks", found, _places(whole, x), x, SCORE, title)
    blocks: list[Block] = []
    tasks = list(dict.fromkeys(p.place.coordinates["task"] for p in mine))
    for task in tasks:
        here = [p for p in mine if p.place.coordinates["task"] == task]
        order = _places([p for p in whole if p.place.coordinates["task"] == task], x)
        blocks += _figure(f"{name}-{task}", _series(here, x), order, x, SCORE, f"{title}: {task}")
    if len(tasks) > 1 and x != ELSEWHERE:
        told = f"{title}: mean over {', '.join(tasks)}"
        blocks += _figure(f"{name}-mean", _averaged(mine, tasks, x), _places(whole, x), x, SCORE, told)
    return blocks


def share(section: Mapping[str, Any], name: str, whole: Sequence[Point]) -> list[Block]:
    """Trained numbers in percent of the model's, on a logarithmic axis, for one task; none where nothing is trained.

    Lester et al. 2021, Figure 4.
    """
    x = "size" if whole and "size" in whole[0].place.coordinates else "method"
    mine = [p for p in whole if p.rows and p.rows[0]["parameters"]]
    first = [p for p in mine if p.place.coordinates["task"] == mine[0].place.coordinates["task"]]
    found: Series = {}
    for p in first:
        row = p.rows[0]
        at = p.place.coordinates
        part = row["parameters"] / row["backbone"]["parameters"]
        found.setdefault(at["method"] if x == "size" else "", []).append((at[x], [part]))
    title = f"{section['title']}: {name}"
    y = "trained numbers, % of the model"
    return _figure(f"{name}-share", found, _places(whole, x), x, y, title, log=True)


def shifts(point: Point) -> list[str]:
    """The shifted tests of a point, as its rows name them."""
    return list(dict.fromkeys(n for row in point.rows for n in row["scores"] if n.startswith("shift:")))


def _axis(section: Mapping[str, Any], whole: Sequence[Point]) -> str:
    wanted = section.get("x", [])
    axes = [] if not whole else [*whole[0].place.coordinates, ELSEWHERE]
    return next((x for x in ([wanted] if isinstance(wanted, str) else wanted) if x in axes), "")


def _places(whole: Sequence[Point], x: str) -> list[str]:
    """Labels of the axis in the study's order, whatever was run first."""
    if x != ELSEWHERE:
        return list(dict.fromkeys(p.place.coordinates[x] for p in whole))
    far = [name for p in whole for name in p.place.cell.shift]
    return list(dict.fromkeys([*(p.place.coordinates["task"] for p in whole), *far]))


def _label(point: Point, mine: Sequence[Point], x: str) -> str:
    """What tells a point's line from the others: its labels on the axes that vary, or its method if that is not x."""
    varies = [
        axis
        for axis in point.place.coordinates
        if axis not in ("task", x) and len({p.place.coordinates[axis] for p in mine}) > 1
    ]
    own = "" if x == "method" else point.place.coordinates["method"]
    return ", ".join(point.place.coordinates[a] for a in varies) or own


def _series(mine: Sequence[Point], x: str) -> Series:
    found: Series = {}
    for p in mine:
        at, label = p.place.coordinates, _label(p, mine, x)
        if x == ELSEWHERE:
            far = [(what.removeprefix("shift:"), p.numbers(what)) for what in shifts(p)]
            found.setdefault(label, []).extend([(at["task"], p.numbers("test")), *far])
            continue
        if each := p.numbers("member.test") if p.place.cell.do == "ensemble" else []:
            found.setdefault("each alone", []).append((at[x], each))
        found.setdefault(label, []).append((at[x], p.numbers("test")))
    return found


def _averaged(mine: Sequence[Point], tasks: Sequence[str], x: str) -> Series:
    """The mean over all tasks, seed by seed, where each of them was run."""
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for p in mine:
        at = p.place.coordinates
        groups.setdefault((_label(p, mine, x), at[x]), {})[at["task"]] = p.numbers("test")
    found: Series = {}
    for (label, place), each in groups.items():
        if len(each) == len(tasks):
            seeds = zip(*each.values(), strict=False)
            found.setdefault(label, []).append((place, [statistics.fmean(seed) for seed in seeds]))
    return found


def _figure(
    name: str, series: Series, order: Sequence[str], x: str, y: str, title: str, log: bool = False
) -> list[Block]:
    """A figure of more than one place; of one there is nothing to see that the table does not say."""
    used = {place for points in series.values() for place, _ in points}
    places = [place for place in order if place in used]
    if len(places) < 2:
        return []
    svg = figures.lines(series, places, x, y, title, joined=x not in UNORDERED, log=log)
    spread = "" if log else ", mean and deviation over seeds"
    return [Figure(name, svg, f"{title}{spread}")]
