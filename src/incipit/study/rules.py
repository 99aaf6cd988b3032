"""Rules: what a claim asks of the points -> a verdict and the numbers that decided.

A difference is seen when zero lies outside its 95 % interval over seeds (`points.estimate`).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from incipit.study.evidence import (
    FAILS,
    HOLDS,
    NOT_RUN,
    NOTHING,
    UNSEEN,
    Claimed,
    Found,
    Judged,
    along,
    each,
    gap,
    incomplete,
    labels_of,
    named,
    number,
    paired,
    plain,
    what_of,
)
from incipit.study.points import Estimate, Points, estimate, mean_of


def _signed(found: Estimate) -> str:
    """Holds above zero, fails below, where either is seen."""
    if not found.seen:
        return UNSEEN
    return HOLDS if found.value > 0 else FAILS


def _greater(claim: Claimed, points: Points) -> Judged:
    """left > right, over all settings in which both were run."""
    left, right = paired(claim, points, {})
    if not left:
        return NOTHING
    found = estimate((1.0, [*left.values()]), (-1.0, [*right.values()]))
    return _signed(found), _against(claim, left, right, found)


def _no_worse(claim: Claimed, points: Points) -> Judged:
    """left >= right - margin, surely: the whole interval lies above."""
    left, right = paired(claim, points, {})
    if not left:
        return NOTHING
    margin = float(claim["margin"])
    found = estimate((1.0, [*left.values()]), (-1.0, [*right.values()]))
    told = f"{_against(claim, left, right, found)}; margin {number(margin, what_of(claim))}"
    if found.value - found.reach >= -margin:
        return HOLDS, told
    return (FAILS if found.value + found.reach < -margin else UNSEEN), told


def _equal(claim: Claimed, points: Points) -> Judged:
    """|left - right| <= margin, surely: the whole interval lies within."""
    left, right = paired(claim, points, {})
    if not left:
        return NOTHING
    margin = float(claim.get("margin", 0.02))
    found = estimate((1.0, [*left.values()]), (-1.0, [*right.values()]))
    told = f"{_against(claim, left, right, found)}; margin {number(margin, what_of(claim))}"
    if abs(found.value) + found.reach <= margin:
        return HOLDS, told
    return (FAILS if abs(found.value) - found.reach > margin else UNSEEN), told


def _against(claim: Claimed, left: Found, right: Found, found: Estimate) -> str:
    """Both sides, their difference, and in how many settings the left is above."""
    what = what_of(claim)
    sides = [
        f"{named(claim[side])} ({number(mean_of(values.values()), what)})"
        for side, values in (("left", left), ("right", right))
    ]
    won = sum(statistics.fmean(left[k]) > statistics.fmean(right[k]) for k in left)
    told = "" if what == "test" else f"{what}, "
    told += (
        f"{' minus '.join(sides)}: {gap(found, what)} over {len(left)} pair(s) of settings, above in {won}"
    )
    return told


def _gap_shrinks(claim: Claimed, points: Points) -> Judged:
    """left - right is there at the first label of the axis `along`, and smaller at the last.

    Over the settings that every label has: gaps of other tasks are no comparison. Labels without any are left out.
    """
    axis, sides = claim["along"], {}
    for label in labels_of(points, claim["experiment"], axis):
        left, right = paired(claim, points, {axis: label}, without=axis)
        if left:
            sides[label] = (left, right)
    if len(sides) < 2:
        return NOTHING if not sides else (NOT_RUN, f"fewer than two labels of {axis} were run")
    common = [key for key in next(iter(sides.values()))[0] if all(key in left for left, _ in sides.values())]
    if not common:
        return NOT_RUN, f"no setting was run at every label of {axis}"
    what, told, groups = what_of(claim), [], []
    for label, side in sides.items():
        both = [[one[key] for key in common] for one in side]
        groups.append(both)
        means = [mean_of(one) for one in both]
        apart = means[0] - means[1]
        sign = f"{apart:+.3g}" if plain(what) else f"{100 * apart:+.1f}"
        told.append(f"{label} {sign} ({number(means[0], what)}, {number(means[1], what)})")
    (l0, r0), (l1, r1) = groups[0], groups[-1]
    first = estimate((1.0, l0), (-1.0, r0))
    change = estimate((1.0, l0), (-1.0, r0), (-1.0, l1), (1.0, r1))
    evidence = (
        f"{named(claim['left'])} minus {named(claim['right'])} by {axis}: {', '.join(told)}; "
        f"first minus last {gap(change, what)} over {len(common)} setting(s)"
    )
    verdict = _signed(change)
    if verdict == HOLDS and not (first.seen and first.value > 0):
        verdict = UNSEEN  # there was no gap that could shrink
    return verdict, evidence


def _saturates(claim: Claimed, points: Points) -> Judged:
    """From `steps[0]` to `steps[1]` a rise is seen; from there to `steps[2]` the way, up or down, is less than half."""
    means = along(claim, points, claim["steps"])
    if not means:
        return incomplete(claim, points)
    a, b, c = means
    told = each(claim["steps"], means, what_of(claim))
    rise = estimate((1.0, b), (-1.0, a))
    if not rise.seen or rise.value < 0:
        return (FAILS if rise.seen else UNSEEN), told
    room = [estimate((1.5, b), (-0.5, a), (-1.0, c)), estimate((-0.5, b), (-0.5, a), (1.0, c))]
    if all(one.seen and one.value > 0 for one in room):
        return HOLDS, told
    return (FAILS if any(one.seen and one.value < 0 for one in room) else UNSEEN), told


def _ordered(claim: Claimed, points: Points) -> Judged:
    """Numbers do not fall along `labels` of an axis, and the last is above the first; strict: every step is a rise."""
    labels = claim.get("labels") or labels_of(points, claim["experiment"], claim["along"])
    means = along(claim, points, labels)
    if not means:
        return incomplete(claim, points)
    what = what_of(claim)
    whole = estimate((1.0, means[-1]), (-1.0, means[0]))
    steps = [estimate((1.0, b), (-1.0, a)) for a, b in itertools.pairwise(means)]
    told = f"{each(labels, means, what)}; last minus first {gap(whole, what)}"
    if (whole.seen and whole.value < 0) or any(step.seen and step.value < 0 for step in steps):
        return FAILS, told
    rises = [whole, *(steps if claim.get("strict") else ())]
    if claim.get("strict") and (unseen := sum(not step.seen for step in steps)):
        told += f", {unseen} of {len(steps)} steps not seen"
    return (HOLDS if all(rise.seen for rise in rises) else UNSEEN), told


def _steady(claim: Claimed, points: Points) -> Judged:
    """The deviation over seeds is at most half of that between settings, net of what the seeds alone would make.

    sqrt(mean s²) <= sqrt(mean over groups of var(means) - mean s²/n) / 2. A group: all settings, or with `along` those
    that differ in this axis alone.
    """
    axis = claim.get("along")
    groups: dict[tuple[str, ...], list[list[float]]] = {}
    for point in points.of_experiment(claim["experiment"]):
        at, numbers = point.place.coordinates, point.numbers("test")
        if len(numbers) > 1 and all(at.get(a) == label for a, label in claim.get("where", {}).items()):
            rest = tuple(label for a, label in at.items() if a != axis) if axis else ()
            groups.setdefault(rest, []).append(numbers)
    kept = [group for group in groups.values() if len(group) > 1]
    if not kept:
        return (NOT_RUN, "fewer than two settings were run") if groups else NOTHING
    values = [numbers for group in kept for numbers in group]
    spread = math.sqrt(statistics.fmean(statistics.variance(v) for v in values))
    noise = statistics.fmean(statistics.variance(v) / len(v) for v in values)
    apart = statistics.fmean(statistics.variance([statistics.fmean(v) for v in group]) for group in kept)
    between = math.sqrt(max(0.0, apart - noise))
    largest = max(statistics.stdev(v) for v in values)
    return (
        HOLDS if spread <= between / 2 else FAILS,
        f"deviation over seeds {100 * spread:.1f} (largest {100 * largest:.1f}), between {len(values)} settings "
        f"{100 * between:.1f} points" + (f", those that differ in {axis} alone" if axis else ""),
    )


def _within(claim: Claimed, points: Points) -> Judged:
    """A number of the rows is at least (or at most) a bound; exact: in every row, for seeds do not move it."""
    values = points.values(claim["experiment"], claim.get("where", {}), claim["what"])
    if not values:
        return NOTHING
    low, high = claim.get("at_least"), claim.get("at_most")
    bound = float(claim["at_most"] if low is None else low)
    wanted = f"at least {low}" if low is not None else f"at most {high}"
    what = str(claim["what"])
    if claim.get("exact"):
        every = [number for group in values.values() for number in group]
        worst = min(every) if low is not None else max(every)
        good = worst >= bound if low is not None else worst <= bound
        told = f"{what}: {worst:.4g} in the worst of {len(every)} rows ({wanted} wanted), {len(values)} setting(s)"
        return (HOLDS if good else FAILS), told
    found = estimate((1.0, [*values.values()]))
    error = "unknown" if math.isinf(found.error) else f"{found.error:.2g}"
    told = f"{what}: {found.value:.3g} ± {error} ({wanted} wanted) over {len(values)} setting(s)"
    room = found.value - bound if low is not None else bound - found.value
    if math.isinf(found.reach) or (abs(room) < found.reach):
        return UNSEEN, told
    return (HOLDS if room >= 0 else FAILS), told


def _above(claim: Claimed, points: Points) -> Judged:
    """One number of a row is above another of it; with `along`: at each label of an axis.

    A vote is one number against one of each of its prompts. beside: a third number, told with how often it is reached.
    """
    axis, where = claim.get("along"), claim.get("where", {})
    labels = labels_of(points, claim["experiment"], axis) if axis else [""]
    verdicts, told, reached = [], [], []
    for label in labels:
        at = {**where, axis: label} if axis else where
        one, other, third = (
            points.values(claim["experiment"], at, claim[key]) if key in claim else {}
            for key in ("what", "than", "beside")
        )
        both = [k for k in one if k in other and (len(one[k]) == 1 or len(one[k]) == len(other[k]))]
        if not both:
            continue
        groups = [
            [
                a - b
                for a, b in zip(one[k] * (len(other[k]) if len(one[k]) == 1 else 1), other[k], strict=True)
            ]
            for k in both
        ]
        found = estimate((1.0, groups))
        verdicts.append(_signed(found))
        told.append(f"{label} {gap(found, claim['what'])} over {len(both)} setting(s)".strip())
        reached += [statistics.fmean(one[k]) >= statistics.fmean(third[k]) for k in both if k in third]
    if not verdicts:
        return NOTHING
    evidence = f"{claim['what']} minus {claim['than']}: {', '.join(told)}"
    if reached:
        evidence += f"; not below {claim['beside']} in {sum(reached)} of {len(reached)}"
    if len(set(verdicts)) == 1:
        return verdicts[0], evidence
    return (FAILS if FAILS in verdicts else UNSEEN), evidence


def _shifted(claim: Claimed, points: Points) -> Judged:
    """left > right on the mean of all shifted tests, told beside the difference on their own test.

    matched: how far the two may lie apart on their own test to be compared at all.
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
        left, right = paired(claim, points, {}, what=split)
        for side, found in ((lefts, left), (rights, right)):
            for key, numbers in found.items():
                side.setdefault(key, []).append(numbers)
        won += bool(left) and mean_of(left.values()) > mean_of(right.values())
    if not lefts:
        return NOTHING
    home = paired(claim, points, {})
    own = estimate((1.0, [*home[0].values()]), (-1.0, [*home[1].values()]))
    away = estimate((1.0, _by_seed(lefts)), (-1.0, _by_seed(rights)))
    evidence = (
        f"{named(claim['left'])} minus {named(claim['right'])} elsewhere: {gap(away, 'test')} over {len(lefts)} "
        f"pair(s) of settings, above in {won} of {len(splits)}; in its own domain {gap(own, 'test')}"
    )
    margin = claim.get("matched")
    if margin is not None and abs(own.value) > margin:
        return UNSEEN, f"{evidence}: not matched there (margin {100 * margin:.1f})"
    return _signed(away), evidence


def _by_seed(tests: Mapping[Any, Sequence[Sequence[float]]]) -> list[list[float]]:
    """Each seed's mean over the tests of a setting: they are scores of one prompt, so they do not err apart."""
    return [[statistics.fmean(seed) for seed in zip(*each, strict=False)] for each in tests.values()]


def _ratio(claim: Claimed, points: Points) -> Judged:
    """left / right of a number is at most a bound."""
    left, right = paired(claim, points, {})
    if not left or not all(mean_of([v]) for v in right.values()):
        return NOTHING
    one, other = mean_of(left.values()), mean_of(right.values())
    told = f"{one:,.0f} / {other:,.0f} = {one / other:.2g} (at most {claim['at_most']} wanted)"
    return (HOLDS if one / other <= claim["at_most"] else FAILS), told


RULES: dict[str, Callable[[Claimed, Points], Judged]] = {
    "greater": _greater,
    "no_worse": _no_worse,
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
