"""Claims: what the paper says, judged by the records through a rule; never by hand.

    [[claims]]
    number = 2
    text = "A tuned prompt beats worked examples on the same frozen model"
    rule = "greater"
    experiment = "size"
    left = { method = "prompt" }
    right = { method = "few-shot" }

A verdict is "holds", "fails", "not visible here" (the difference is smaller than twice its standard error over seeds,
or the setting cannot show it) or "not run". A claim without a rule is "not run", and its `note` says why. A table
named after a scale replaces keys at that scale.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from incipit.errors import RecipeError, nearest
from incipit.study.checks import Needed
from incipit.study.points import Points, error_of, mean_of

HOLDS, FAILS, UNSEEN, NOT_RUN = "holds", "fails", "not visible here", "not run"
VERDICTS = (HOLDS, FAILS, UNSEEN, NOT_RUN)
Judged: TypeAlias = tuple[str, str]  # verdict, evidence
Groups: TypeAlias = dict[tuple[str, ...], list[float]]
NOTHING: Judged = (NOT_RUN, "no records")


@dataclass(frozen=True)
class Claim:
    """One claim with its verdict. evidence: the numbers that decided."""

    number: int
    text: str
    source: str
    verdict: str
    evidence: str


def judge(claims: Sequence[Mapping[str, Any]], points: Points, scale: str = "") -> list[Claim]:
    """Every claim in its order. Raises RecipeError for an unknown rule or experiment."""
    known = {p.place.experiment for p in points.points}
    found = []
    for place, one in enumerate(claims, 1):
        claim = Needed({**one, **one.get(scale, {})}, f"claims.toml: claim {place}")
        rule = str(claim.get("rule", ""))
        verdict, evidence = NOT_RUN, str(claim.get("note", "no rule"))
        if rule and rule not in RULES:
            raise RecipeError(f"claim {claim['number']}: rule {rule!r} is unknown{nearest(rule, RULES)}")
        if rule and claim["experiment"] in known:
            verdict, evidence = RULES[rule](claim, points)
        elif rule:
            verdict, evidence = NOT_RUN, f"this scale has no experiment {claim['experiment']!r}"
        found.append(
            Claim(int(claim["number"]), str(claim["text"]), str(claim.get("source", "")), verdict, evidence)
        )
    return found


def _difference(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean of left minus right over paired points, and its standard error."""
    return mean_of(left) - mean_of(right), (error_of(left) ** 2 + error_of(right) ** 2) ** 0.5


def _paired(claim: Mapping[str, Any], points: Points, where: Mapping[str, str]) -> tuple[Groups, Groups]:
    """Points at left and at right that agree in every other coordinate, keyed by these."""
    sides = []
    for side in ("left", "right"):
        chosen = {**where, **claim[side]}
        values: Groups = {}
        for point in points.of_experiment(claim["experiment"]):
            at = point.place.coordinates
            numbers = point.numbers(str(claim.get("what", "test")))
            if numbers and all(at.get(axis) == label for axis, label in chosen.items()):
                values[tuple(v for axis, v in at.items() if axis not in claim[side])] = numbers
        sides.append(values)
    both = [key for key in sides[0] if key in sides[1]]
    return {k: sides[0][k] for k in both}, {k: sides[1][k] for k in both}


def _told(value: float, scale: float = 100) -> str:
    return f"{scale * value:+.1f}"


def _signed(difference: float, error: float, count: int, what: str) -> Judged:
    evidence = f"{what}: {_told(difference)} ± {100 * error:.1f} points over {count} pair(s) of settings"
    if abs(difference) <= 2 * error or difference == 0:
        return UNSEEN, evidence
    return (HOLDS if difference > 0 else FAILS), evidence


def _greater(claim: Mapping[str, Any], points: Points) -> Judged:
    """left > right, over all settings in which both were run."""
    left, right = _paired(claim, points, claim.get("where", {}))
    if not left:
        return NOTHING
    difference, error = _difference(list(left.values()), list(right.values()))
    return _signed(difference, error, len(left), f"{_named(claim['left'])} minus {_named(claim['right'])}")


def _equal(claim: Mapping[str, Any], points: Points) -> Judged:
    """|left - right| <= margin."""
    left, right = _paired(claim, points, claim.get("where", {}))
    if not left:
        return NOTHING
    difference, error = _difference(list(left.values()), list(right.values()))
    margin = float(claim.get("margin", 0.02))
    evidence = (
        f"{_told(difference)} ± {100 * error:.1f} points, margin {100 * margin:.1f}, {len(left)} pair(s)"
    )
    if 2 * error > margin:
        return UNSEEN, evidence
    return (HOLDS if abs(difference) <= margin + 2 * error else FAILS), evidence


def _gap_shrinks(claim: Mapping[str, Any], points: Points) -> Judged:
    """left - right falls from the first to the last label of the axis `along`."""
    labels = _labels(points, claim["experiment"], claim["along"])
    gaps = []
    for label in labels:
        left, right = _paired(claim, points, {**claim.get("where", {}), claim["along"]: label})
        if left:
            gaps.append((label, *_difference(list(left.values()), list(right.values()))))
    if len(gaps) < 2:
        return NOTHING if not gaps else (NOT_RUN, "fewer than two sizes were run")
    told = ", ".join(f"{label} {_told(gap)}" for label, gap, _ in gaps)
    (_, first, e1), (_, last, e2) = gaps[0], gaps[-1]
    error = (e1**2 + e2**2) ** 0.5
    if first <= 2 * e1 or abs(first - last) <= 2 * error:
        return UNSEEN, f"gap by {claim['along']}: {told}"
    return (HOLDS if last < first else FAILS), f"gap by {claim['along']}: {told}"


def _along(claim: Mapping[str, Any], points: Points, labels: Sequence[str]) -> list[tuple[float, float]]:
    """(mean, error) at each label of the axis `along`, over the settings where every label was run; else []."""
    axis, sides = claim["along"], []
    for label in labels:
        side: Groups = {}
        for point in points.of_experiment(claim["experiment"]):
            at, numbers = point.place.coordinates, point.numbers(str(claim.get("what", "test")))
            wanted = {**claim.get("where", {}), axis: label}
            if numbers and all(at.get(a) == value for a, value in wanted.items()):
                side[tuple(value for a, value in at.items() if a != axis)] = numbers
        sides.append(side)
    common = [key for key in sides[0] if all(key in side for side in sides)]
    groups = [[side[key] for key in common] for side in sides]
    return [(mean_of(group), error_of(group)) for group in groups] if common else []


def _told_along(labels: Sequence[str], means: Sequence[tuple[float, float]]) -> str:
    return ", ".join(
        f"{label}: {100 * m:.1f} ± {100 * e:.1f}" for label, (m, e) in zip(labels, means, strict=True)
    )


def _saturates(claim: Mapping[str, Any], points: Points) -> Judged:
    """The rise from `steps[0]` to `steps[1]` is real, and the one from there to `steps[2]` less than half of it."""
    means = _along(claim, points, claim["steps"])
    if not means:
        return NOTHING
    (a, ea), (b, eb), (c, _) = means
    told = _told_along(claim["steps"], means)
    if b - a <= 2 * (ea**2 + eb**2) ** 0.5:
        return UNSEEN, told
    return (HOLDS if c - b < (b - a) / 2 else FAILS), told


def _ordered(claim: Mapping[str, Any], points: Points) -> Judged:
    """Scores do not fall along `labels` of an axis, and the last is above the first."""
    labels = claim.get("labels") or _labels(points, claim["experiment"], claim["along"])
    means = _along(claim, points, labels)
    if not means:
        any_run = any(point.rows for point in points.of_experiment(claim["experiment"]))
        return (NOT_RUN, "not every setting was run") if any_run else NOTHING
    told = _told_along(labels, means)
    (first, e1), (last, e2) = means[0], means[-1]
    if abs(last - first) <= 2 * (e1**2 + e2**2) ** 0.5:
        return UNSEEN, told
    steps = [b - a >= -2 * (x**2 + y**2) ** 0.5 for (a, x), (b, y) in itertools.pairwise(means)]
    return (HOLDS if last > first and all(steps) else FAILS), told


def _steady(claim: Mapping[str, Any], points: Points) -> Judged:
    """The deviation over seeds is less than half of the range of the settings' means."""
    values = [v for v in points.values(claim["experiment"], claim.get("where", {})).values() if len(v) > 1]
    if len(values) < 2:
        return NOTHING
    spread = statistics.fmean(statistics.stdev(v) for v in values)
    means = [statistics.fmean(v) for v in values]
    extent = max(means) - min(means)
    return (
        HOLDS if spread < extent / 2 else FAILS,
        f"mean deviation over seeds {100 * spread:.1f}, range over {len(means)} settings {100 * extent:.1f} points",
    )


def _within(claim: Mapping[str, Any], points: Points) -> Judged:
    """A number of the rows is at least (or at most) a bound, in the mean."""
    values = points.values(claim["experiment"], claim.get("where", {}), claim["what"])
    if not values:
        return NOTHING
    mean = mean_of(values.values())
    low, high = claim.get("at_least"), claim.get("at_most")
    good = (low is None or mean >= low) and (high is None or mean <= high)
    bound = f"at least {low}" if low is not None else f"at most {high}"
    return (
        HOLDS if good else FAILS
    ), f"{claim['what']}: {mean:.3g} ({bound} wanted) over {len(values)} setting(s)"


def _above(claim: Mapping[str, Any], points: Points) -> Judged:
    """One number of a row is above another number of the same row."""
    one = points.values(claim["experiment"], claim.get("where", {}), claim["what"])
    other = points.values(claim["experiment"], claim.get("where", {}), claim["than"])
    both = [key for key in one if key in other]
    if not both:
        return NOTHING
    pairs = [(statistics.fmean(one[k]), statistics.fmean(other[k])) for k in both]
    won = sum(a >= b for a, b in pairs)
    difference = statistics.fmean(a - b for a, b in pairs)
    told = f"{claim['what']} minus {claim['than']}: {difference:+.3f} in the mean"
    evidence = f"{told}, not below in {won} of {len(pairs)} setting(s)"
    if won * 2 == len(pairs) or difference == 0:
        return UNSEEN, evidence
    return (HOLDS if won * 2 > len(pairs) and difference > 0 else FAILS), evidence


def _shifted(claim: Mapping[str, Any], points: Points) -> Judged:
    """left > right on the mean of all shifted tests, told beside the difference on their own test.

    matched: how far the two may lie apart on their own test, beyond twice its error, to be compared at all.
    """
    splits = dict.fromkeys(
        name
        for p in points.of_experiment(claim["experiment"])
        for row in p.rows
        for name in row["scores"]
        if name.startswith("shift:")
    )
    lefts: dict[tuple[str, ...], list[list[float]]] = {}  # setting -> test -> one number a seed
    rights: dict[tuple[str, ...], list[list[float]]] = {}
    won = 0
    for split in splits:
        left, right = _paired({**claim, "what": split}, points, claim.get("where", {}))
        for side, found in ((lefts, left), (rights, right)):
            for key, numbers in found.items():
                side.setdefault(key, []).append(numbers)
        won += bool(left) and mean_of(left.values()) > mean_of(right.values())
    if not lefts:
        return NOTHING
    own = _difference(*(list(side.values()) for side in _paired(claim, points, claim.get("where", {}))))
    verdict, told = _signed(
        *_difference(_by_seed(lefts), _by_seed(rights)),
        len(lefts),
        f"{_named(claim['left'])} minus {_named(claim['right'])} elsewhere",
    )
    evidence = (
        f"{told}, above in {won} of {len(splits)}; in its own domain {_told(own[0])} ± {100 * own[1]:.1f}"
    )
    margin = claim.get("matched")
    if margin is not None and abs(own[0]) > margin + 2 * own[1]:
        return UNSEEN, f"{evidence}: not matched there (margin {100 * margin:.1f})"
    return verdict, evidence


def _by_seed(tests: Mapping[Any, Sequence[Sequence[float]]]) -> list[list[float]]:
    """Each seed's mean over the tests of a setting: they are scores of one prompt, so they do not err apart."""
    return [[statistics.fmean(seed) for seed in zip(*each, strict=False)] for each in tests.values()]


def _ratio(claim: Mapping[str, Any], points: Points) -> Judged:
    """left / right of a number is at most a bound."""
    left, right = _paired(claim, points, claim.get("where", {}))
    if not left or not all(mean_of([v]) for v in right.values()):
        return NOTHING
    ratio = mean_of(left.values()) / mean_of(right.values())
    return (HOLDS if ratio <= claim["at_most"] else FAILS), f"{ratio:.2g} (at most {claim['at_most']} wanted)"


def _named(where: Mapping[str, str]) -> str:
    return ", ".join(where.values())


def _labels(points: Points, experiment: str, axis: str) -> list[str]:
    return list(dict.fromkeys(p.place.coordinates[axis] for p in points.of_experiment(experiment)))


RULES: dict[str, Callable[[Mapping[str, Any], Points], Judged]] = {
    "greater": _greater,
    "equal": _equal,
    "gap_shrinks": _gap_shrinks,
    "saturates": _saturates,
    "ordered": _ordered,
    "steady": _steady,
    "within": _within,
    "above": _above,
    "shifted": _shifted,
    "ratio": _ratio,
}
