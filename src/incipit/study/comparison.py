"""Comparison: records of paired runs -> the same page as a grid's, with paired tests and verdicts.

    studies/NAME/study.toml     title, paper, [comparison], [[sections]], and [[claims]] with the rule that judges each

A study that has the table [comparison] is run by a script of its own, which puts several methods on the same data,
seed by seed.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from incipit import files
from incipit.errors import DataError, RecipeError, nearest
from incipit.study import figures
from incipit.study.claims import FAILS, HOLDS, NOT_RUN, UNSEEN, VERDICTS, Claim, Judged
from incipit.study.page import Block, Figure, Heading, Table, Text
from incipit.study.paired import Paired, Row, flipped, overlap, rank_correlation
from incipit.study.report import Report

LEVEL = 0.05
READING = (
    "Scores are in percent on the test split, mean ± deviation over seeds. A difference is the mean over the cells "
    "(task and seed) in which both were run, in points; p is the exact two-sided test over all choices of its signs. "
    f"A claim holds, or fails, where its difference has the sign, or the other one, with p < {LEVEL:g}; p values are "
    "not corrected for their number. Cells of one task share their test examples: p speaks of seeds, not of examples."
)


def is_comparison(folder: Path) -> bool:
    """Whether a study is of this kind."""
    return "comparison" in files.read_toml(folder / "study.toml")


def build(folder: Path, rows: Sequence[Row]) -> Report:
    """The report of these records; DataError where they are none."""
    story = files.read_toml(folder / "study.toml")
    if not rows:
        raise DataError(f"the study {folder.name!r} has no record: run {folder / 'run.py'}, or name records")
    each = {on: Paired.of(own) for on, own in _apart(rows).items()}
    judged = {on: [_judge(claim, paired) for claim in story.get("claims", [])] for on, paired in each.items()}
    shown = [_named(claim, on, len(each)) for on, own in judged.items() for claim in own]
    cells = [{cell for own in paired.by.values() for cell in own} for paired in each.values()]
    report = Report(
        claims=shown, run=sum(map(len, cells)), places=len(each) * int(story["comparison"]["cells"])
    )
    report.blocks += [
        Heading(1, str(story["title"])),
        Text(str(story["paper"])),
        Text(f"{report.run} of {report.places} cells were run, {len(rows)} records. {READING}"),
        Text("Claims: " + "; ".join(_told(on, own, len(each)) for on, own in judged.items()) + "."),
    ]
    for section in story.get("sections", []):
        report.blocks += _section(section, each)
    report.blocks += [Heading(2, "Claims"), claim_table(judged), *_provenance(rows)]
    return report


def _apart(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The records of each backbone, the one with most weights first: they are never mixed."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: -int(row["backbone"]["parameters"])):
        found.setdefault(str(row["backbone"]["name"]), []).append(row)
    return found


def _named(claim: Claim, on: str, several: int) -> Claim:
    return replace(claim, evidence=f"{on}: {claim.evidence}") if several > 1 else claim


def _told(on: str, judged: Sequence[Claim], several: int) -> str:
    counts = ", ".join(f"{sum(c.verdict == v for c in judged)} {v}" for v in VERDICTS)
    return f"{counts} ({on})" if several > 1 else counts


def claim_table(judged: Mapping[str, Sequence[Claim]]) -> Table:
    """The claims, with verdict and evidence on each backbone; one that was judged nowhere has one row."""
    header = ["#", "claim", "source", *(["backbone"] if len(judged) > 1 else []), "verdict", "evidence"]
    rows = []
    for own in zip(*judged.values(), strict=True):
        nowhere = all(claim.verdict == NOT_RUN for claim in own)
        for on, claim in list(zip(judged, own, strict=True))[: 1 if nowhere else None]:
            where = [] if len(judged) == 1 else ["" if nowhere else on]
            rows.append([str(claim.number), claim.text, claim.source, *where, claim.verdict, claim.evidence])
    return Table(header, rows)


def spread(scores: Sequence[float]) -> str:
    """ "81.2 ± 1.5" in percent; "" of none."""
    if not scores:
        return ""
    mean = f"{100 * statistics.fmean(scores):.1f}"
    return f"{mean} ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else mean


def _section(section: Mapping[str, Any], each: Mapping[str, Paired]) -> list[Block]:
    """A heading, then on every backbone a figure, and a table for each label of the axis that is `apart`."""
    blocks: list[Block] = [Heading(2, str(section["title"]))]
    if "about" in section:
        blocks.append(Text(str(section["about"])))
    for on, paired in each.items():
        methods = [m for m in section["methods"] if m in paired.by]
        told = f"On {on}" if len(each) > 1 else ""
        if not methods:
            blocks.append(Text(f"{told}: not run." if told else "Not run."))
            continue
        blocks += _drawn(section, paired, on if told else "")
        apart = section.get("apart", [])
        for where in [[label] for label in apart] or [[]]:
            if any(paired.scores(m, where) for m in methods):
                head = ", ".join(
                    [*([told] if told else []), *(f"{section['axis']} {label}" for label in where)]
                )
                blocks += [Text(f"{head}:")] if head else []
                blocks.append(table(paired, methods, str(section.get("against", "")), where))
        if section.get("overlap"):
            blocks.append(_overlaps(paired))
    return blocks


def table(paired: Paired, methods: Sequence[str], against: str = "", where: Sequence[str] = ()) -> Table:
    """A row for each method, a column for each place; then the paired difference of `against` and it."""
    places = [at for at in paired.places if set(where) <= set(at)]
    names = [" ".join(x for x in at if x not in where) for at in places]
    several = len(places) > 1
    header = ["method", *names, *(["mean"] if several else []), "cells"]
    header += [f"{against} minus it", "p"] if against else []
    rows = []
    for method in methods:
        each = [list(paired.scores(method, at).values()) for at in places]
        known = [scores for scores in each if scores]
        mean = f"{100 * statistics.fmean(map(statistics.fmean, known)):.1f}" if known else ""
        row = [method, *map(spread, each), *([mean] if several else []), str(sum(map(len, each)))]
        if against:
            apart = paired.differences(against, method, where) if method != against else []
            row += [f"{100 * statistics.fmean(apart):+.1f}", _p(flipped(apart))] if apart else ["", ""]
        rows.append(row)
    return Table(header, rows)


def _drawn(section: Mapping[str, Any], paired: Paired, on: str) -> list[Block]:
    """Means over seeds along the first axis; with `apart` along that axis, each the mean of the tasks."""
    name = "-".join([str(section["id"]), *re.findall(r"\w+", on)])
    title = f"{section['title']}, on {on}" if on else str(section["title"])
    shown = [m for m in section.get("drawn", []) if m in paired.by]
    if not shown:
        return []
    labels = list(section.get("apart", [])) or [" ".join(at) for at in paired.places]
    series = {}
    for method in shown:
        own = []
        for label in labels:
            found = paired.scores(method, [label])
            if section.get("apart"):  # the spread of seeds, each the mean of its tasks
                seeds = sorted({seed for _, seed in found})
                scores = [statistics.fmean(v for (_, s), v in found.items() if s == seed) for seed in seeds]
            else:
                scores = list(found.values())
            if scores:
                own.append((label, scores))
        series[method] = own
    axis = str(section.get("axis", "task"))
    svg = figures.lines(series, labels, axis, "score on test, %", title)
    return [Figure(name, svg, f"{title}, mean and deviation over seeds")]


def _overlaps(paired: Paired) -> Table:
    """Of each task: numbers kept, and whether two seeds find the same tokens."""
    rows = []
    for at in paired.places:
        own = [one.extra for cell, one in sorted(paired.by["pruned"].items()) if cell[0] == at]
        kept = ", ".join(f"{100 * one['pruned']['kept'] / one['pruned']['numbers']:.0f}" for one in own)
        same = (
            "{:.2f} ({:.2f})".format(*overlap([one["scores"]["tokens"] for one in own]))
            if len(own) > 1
            else ""
        )
        cost = statistics.fmean(
            sum(one["cost"][s]["of_plain"] for s in ("scores", "tokens", "pieces")) for one in own
        )
        rows.append([" ".join(at), str(len(own)), kept, same, f"{cost:.2f}"])
    return Table(
        ["task", "seeds", "numbers kept, %", "overlap of seeds (chance)", "search, in plain trainings"], rows
    )


# -- claims --------------------------------------------------------------------------------------------------------


def _judge(claim: Mapping[str, Any], paired: Paired) -> Claim:
    """By its rule; without one it is not run, and its note says why."""
    rule = str(claim.get("rule", ""))
    if rule and rule not in RULES:
        raise RecipeError(f"claim {claim['number']}: rule {rule!r} is unknown{nearest(rule, RULES)}")
    verdict, evidence = RULES[rule](claim, paired) if rule else (NOT_RUN, str(claim.get("note", "no rule")))
    return Claim(int(claim["number"]), str(claim["text"]), str(claim.get("source", "")), verdict, evidence)


def _signed(values: Sequence[float], what: str, unit: float = 100.0, word: str = "points") -> Judged:
    if not values:
        return NOT_RUN, "no records"
    p, mean = flipped(values), statistics.fmean(values)
    told = f"{what}: {unit * mean:+.1f} {word}".rstrip() if unit > 1 else f"{what}: {mean:+.2f}"
    evidence = f"{told} over {len(values)} cells, p {_p(p)}"
    if p >= LEVEL or mean == 0:
        return UNSEEN, evidence
    return (HOLDS if mean > 0 else FAILS), evidence


def _p(p: float) -> str:
    """As it is printed: an exact test never says 0."""
    return f"{p:.3f}" if p >= 0.0005 else "< 0.001"


def _greater(claim: Mapping[str, Any], paired: Paired) -> Judged:
    """left > right, cell by cell; of several rights the verdict is the least of them."""
    rights = [claim["right"]] if isinstance(claim["right"], str) else list(claim["right"])
    found = [
        _signed(
            paired.differences(claim["left"], right, claim.get("where", [])), f"{claim['left']} minus {right}"
        )
        for right in rights
    ]
    verdicts = [verdict for verdict, _ in found]
    worst = next((v for v in (FAILS, NOT_RUN, UNSEEN, HOLDS) if v in verdicts), NOT_RUN)
    return worst, "; ".join(evidence for _, evidence in found)


def _shrinks(claim: Mapping[str, Any], paired: Paired) -> Judged:
    """left - right is smaller at the last label than at the first, in the cells that agree in all else."""
    sides = []
    for label in (claim["labels"][0], claim["labels"][-1]):
        mine, other = (paired.scores(claim[side], [label]) for side in ("left", "right"))
        sides.append({
            (tuple(x for x in at if x != label), seed): mine[at, seed] - other[at, seed]
            for at, seed in mine if (at, seed) in other
        })  # fmt: skip
    first, last = sides
    falls = [first[key] - last[key] for key in sorted(first) if key in last]
    what = (
        f"{claim['left']} minus {claim['right']} falls from {claim['labels'][0]} to {claim['labels'][-1]} by"
    )
    return _signed(falls, what)


def _correlates(claim: Mapping[str, Any], paired: Paired) -> Judged:
    """A row's numbers go up with those of another row of the same cell: Spearman's rho, against 0."""
    mine, other = paired.by.get(claim["left"], {}), paired.by.get(claim["right"], {})
    found = [
        rank_correlation(mine[cell].extra[claim["numbers"][0]], other[cell].extra[claim["numbers"][1]])
        for cell in sorted(mine) if cell in other
    ]  # fmt: skip
    return _signed(found, str(claim["what"]), 1.0)


def _overlap(claim: Mapping[str, Any], paired: Paired) -> Judged:
    """Two seeds of a task find the same better half of the tokens more often than chance, task by task."""
    apart = []
    for at in paired.places:
        tables = [one.extra["scores"]["tokens"] for cell, one in paired.by["pruned"].items() if cell[0] == at]
        if len(tables) > 1:
            seen, chance = overlap(tables)
            apart.append(seen - chance)
    if len(apart) < 2:
        return NOT_RUN, "needs two seeds of two tasks"
    mean, error = statistics.fmean(apart), statistics.stdev(apart) / len(apart) ** 0.5
    evidence = f"Jaccard index minus chance {mean:+.2f} ± {error:.2f} over {len(apart)} tasks"
    return (UNSEEN if abs(mean) <= 2 * error else HOLDS if mean > 0 else FAILS), evidence


RULES: dict[str, Callable[[Mapping[str, Any], Paired], Judged]] = {
    "greater": _greater,
    "shrinks": _shrinks,
    "correlates": _correlates,
    "overlap": _overlap,
}


def _provenance(rows: Sequence[Row]) -> list[Block]:
    """Commits, versions, seeds, hours."""
    each = [row["provenance"] for row in rows]
    seconds = [float(row["seconds"]) for row in rows]
    told = [
        ["commits", "; ".join(sorted({p["commit"][:12] + " (dirty)" * p["dirty"] for p in each}))],
        [
            "versions",
            "; ".join(sorted({", ".join(f"{k} {v}" for k, v in p["versions"].items()) for p in each})),
        ],
        [
            "machines",
            "; ".join(sorted({", ".join(f"{k} {v}" for k, v in p["machine"].items()) for p in each})),
        ],
        ["seeds", ", ".join(map(str, sorted({int(row["seed"]) for row in rows})))],
        ["hours, on a machine that did other things too", f"{sum(seconds) / 3600:.2f}"],
        [
            "backbones",
            "; ".join(sorted({f"{r['backbone']['name']} ({r['backbone']['parameters']:,})" for r in rows})),
        ],
    ]
    return [Heading(2, "Provenance"), Table(["what", "is"], told)]
