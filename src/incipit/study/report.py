"""Report: records -> one HTML page that opens without a network, and the same in Markdown.

Every section of study.toml becomes a figure and a table with mean and deviation over seeds, the published value
beside ours where one is printed, then the claims with their verdicts, what was left aside, and the provenance.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from incipit import files, record
from incipit.errors import DataError
from incipit.study import claims, drawn
from incipit.study.checks import AXES, Needed
from incipit.study.page import Block, Figure, Heading, Table, Text, as_html, as_markdown
from incipit.study.plan import Study
from incipit.study.points import VOTED, Point, Points

READING = (
    "Scores are in percent, mean ± deviation over seeds, on the test split, or on validation where a task has no "
    "other; checkpoints were chosen on validation. Where answers are written, one that is no label word counts as "
    "wrong; where label words are ranked none can be, and the column legal tells how many freely written answers would "
    "be label words. Seconds are of one seed; seeds that train as a bundle share them."
)
JUDGING = (
    "± in the evidence is a standard error over seeds. What lies within its 95 % interval over seeds is not visible "
    "here. That the test examples are a sample too is not weighed: a point or two may be of these examples."
)
PLURAL = {claims.HOLDS: "hold", claims.FAILS: "fail"}
ALONE, MEAN = (
    "each alone",
    "mean over ",
)  # what a published value is of: an ensemble's members, the mean over tasks
HTML, MARKDOWN, FIGURES = "report.html", "report.md", "figures"


@dataclass
class Report:
    """The blocks of the page, the verdicts, and how much of the study was run."""

    blocks: list[Block] = field(default_factory=list)
    claims: list[claims.Claim] = field(default_factory=list)
    run: int = 0
    places: int = 0


def build(study: Study, rows: Sequence[Mapping[str, Any]], only: Sequence[str] = ()) -> Report:
    """The report of these rows; DataError where no row belongs to the study as it stands now."""
    points = Points.of(study, rows, only)
    if not points.run:
        reasons = (
            ", ".join(f"{count} of {reason}" for reason, count in points.aside.items()) or "no rows at all"
        )
        raise DataError(
            f"no record belongs to the study {study.folder.name!r}, scale {study.scale!r} ({reasons}): "
            "run it, or give the records of this scale"
        )
    story = Needed(files.read_toml(study.folder / "study.toml"), "study.toml")
    published = _optional(study.folder / "published.toml")
    for key in ("values", "tables"):
        rows_of = enumerate(published.get(key, []), 1)
        published[key] = [Needed(one, f"published.toml: [[{key}]] {n}") for n, one in rows_of]
    report = Report(run=points.run, places=len(points.points))
    report.claims = claims.judge(
        _optional(study.folder / "claims.toml").get("claims", []), points, study.scale
    )
    add = report.blocks.append
    add(Heading(1, str(story["title"])))
    add(Text(str(story["paper"])))
    told = f"{points.run} of {len(points.points)} settings were run, {len(points.rows())} records"
    add(Text(f"Scale: {study.scale}. {told}. {READING}"))
    counts = {v: sum(c.verdict == v for c in report.claims) for v in claims.VERDICTS}
    if report.claims:
        told = ", ".join(f"{count} {PLURAL.get(verdict, verdict)}" for verdict, count in counts.items())
        add(Text(f"Of {len(report.claims)} claims: {told}. {JUDGING}"))
        add(Heading(2, "Claims"))
        header = ["#", "claim", "paper", "verdict", "evidence"]
        add(Table(header, [[str(c.number), c.text, c.source, c.verdict, c.evidence] for c in report.claims]))
    for n, section in enumerate(story.get("sections", []), 1):
        needed = Needed(section, f"study.toml: [[sections]] {n}")
        report.blocks += _section(needed, points, published, study.experiments)
    report.blocks += _provenance(points)
    return report


def write(report: Report, folder: files.PathLike) -> list[Path]:
    """report.html, report.md and the figures below `folder`; returns the two pages."""
    place = Path(folder)
    drawn = [block for block in report.blocks if isinstance(block, Figure)]
    for figure in drawn:
        files.atomic_write(place / FIGURES / f"{figure.name}.svg", figure.svg + "\n")
    files.atomic_write(place / HTML, as_html(report.blocks))
    files.atomic_write(place / MARKDOWN, as_markdown(report.blocks, FIGURES))
    return [place / HTML, place / MARKDOWN]


def read_records(paths: Sequence[files.PathLike]) -> list[dict[str, Any]]:
    """The rows of several record files; DataError for one that is not there."""
    rows = []
    for path in paths:
        if not files.exists(path):
            raise DataError(
                f"there are no records at {str(path)!r}; run the study first, or name its records"
            )
        rows += record.read(path)
    return rows


def _optional(path: Path) -> dict[str, Any]:
    return files.read_toml(path) if files.exists(path) else {}


def _section(
    section: Mapping[str, Any], points: Points, published: Mapping[str, Any], known: Mapping[str, Any]
) -> list[Block]:
    """Heading, what the paper shows, its printed tables, our figures and our table. known: this scale's experiments."""
    blocks: list[Block] = [
        Heading(2, str(section["title"])),
        Text(f"{section['paper']}. {section.get('about', '')}".strip()),
    ]
    printed = [t for t in published.get("tables", []) if t["id"] in section.get("published", [])]
    for table in printed:
        blocks.append(Text(f"Published ({table['source']}): {table['title']}"))
        blocks.append(
            Table([str(c) for c in table["columns"]], [[str(v) for v in row] for row in table["rows"]])
        )
        if "note" in table:
            blocks.append(Text(str(table["note"])))
    for name in section.get("share", []):
        blocks += drawn.share(section, name, points.of_experiment(name))
    for name in section.get("experiments", []):
        whole = points.of_experiment(name)
        mine = [p for p in whole if p.rows]
        if not mine:
            blocks.append(Text(f"Ours, {name}: {'not run' if name in known else 'not at this scale'}."))
            continue
        blocks += drawn.scores(section, name, whole)
        values = [v for v in published.get("values", []) if v["experiment"] == name]
        blocks.append(Text(f"Ours, {name}:"))
        blocks.append(_table(mine, values, section))
        blocks += _means(mine, values)
        blocks += _neighbours(mine) if section.get("neighbours") else []
    return blocks


def _means(mine: Sequence[Point], values: Sequence[Mapping[str, Any]]) -> list[Block]:
    """The benchmark's score, where several tasks were run: the mean over tasks of THE metric, seed by seed.

    As SuperGLUE: a task with two metrics counts by their mean, and every task alike.
    """
    tasks = dict.fromkeys(p.place.coordinates["task"] for p in mine)
    groups: dict[tuple[str, ...], dict[str, list[float]]] = {}
    paper: dict[tuple[str, ...], str] = {}
    for p in mine:
        rest = tuple(label for axis, label in p.place.coordinates.items() if axis != "task")
        on = MEAN + ", ".join(tasks)
        printed = [v for v in values if v.get("where", {}).get("on") == on and _matches(v, p, on)]
        for v in printed:
            paper[rest] = f"{v['value']} ({v['source']})"
        if p.numbers("test"):
            groups.setdefault(rest, {})[p.place.coordinates["task"]] = p.numbers("test")
    whole = {rest: found for rest, found in groups.items() if len(found) == len(tasks)}
    if len(tasks) < 2 or not whole:
        return []
    rows = []
    for rest, found in whole.items():
        seeds = min(map(len, found.values()))
        mean = _spread([statistics.fmean(f[n] for f in found.values()) for n in range(seeds)])
        rows.append([", ".join(rest), mean, *([paper.get(rest, "")] if paper else [])])
    header = ["setting", "ours", *(["paper"] if paper else [])]
    return [Text(f"Mean over {len(tasks)} tasks ({', '.join(tasks)}):"), Table(header, rows)]


def _neighbours(mine: Sequence[Point]) -> list[Block]:
    """The nearest pieces of the first tokens of each first prompt."""
    rows = []
    for p in mine:
        for i, pieces in enumerate(p.rows[0]["extra"].get("neighbours", [])[:4]):
            rows.append([", ".join(p.place.coordinates.values()), str(i), ", ".join(pieces)])
    told = Text("Nearest pieces of the first prompt tokens, first seed:")
    return [told, Table(["setting", "token", "nearest"], rows)] if rows else []


def _table(mine: Sequence[Point], values: Sequence[Mapping[str, Any]], section: Mapping[str, Any]) -> Table:
    """A row a point and split (its own test, then each shift), with the paper's value beside it."""
    extras = [str(name) for name in section.get("numbers", [])]
    varies = {a for a in mine[0].place.coordinates if len({p.place.coordinates[a] for p in mine}) > 1}
    own = [a for a in mine[0].place.coordinates if a not in AXES]  # shown even where one label was run
    axes = [a for a in mine[0].place.coordinates if a in varies or a in own or a == "task"]
    costs = ["legal", "parameters", "bytes", "seconds", *(name.removeprefix("extra.") for name in extras)]
    rows = []
    for p in mine:
        at, unprinted = [p.place.coordinates[a] for a in axes], str(section.get("unprinted", "not printed"))
        for what in ("test", *drawn.shifts(p)):
            numbers = p.numbers(what)
            on = what.removeprefix("shift:") if what != "test" else p.place.coordinates["task"]
            paper = [f"{v['value']} ({v['source']})" for v in values if _matches(v, p, on)]
            if numbers:
                seeds = p.rows[0]["extra"].get("members", len(numbers))
                rows.append(
                    [
                        *at,
                        on,
                        _spread(numbers) + _apart(p, what),
                        str(seeds),
                        *(paper or [unprinted])[:1],
                        *_costs(p, extras),
                    ]
                )
        if p.place.cell.do == "ensemble" and (each := p.numbers("member.test")):
            told = f"{_spread(each)}, best {100 * max(each):.1f}"
            paper = [f"{v['value']} ({v['source']})" for v in values if _matches(v, p, ALONE)]
            row = [*at, ALONE, told, str(len(each)), *(paper or [unprinted])[:1]]
            rows.append([*row, *[""] * len(costs)])
    header = [*axes, "tested on", "ours", "seeds", "paper", *costs]
    said = [n for n in range(len(header)) if any(row[n] for row in rows)]  # an encoder has no legal rate
    return Table([header[n] for n in said], [[row[n] for n in said] for row in rows])


def _apart(point: Point, what: str) -> str:
    """ " (f1_binary 84.3, accuracy 76.3)": the further metrics of a task that has several, by their means."""
    split = "validation" if what == "test" and "test" not in point.rows[0]["scores"] else what
    names = [name for name in point.rows[0]["scores"].get(split, {}) if name != "legal_rate"][1:]
    if point.place.cell.recipe.mixture is not None:
        names = list(point.place.cell.recipe.mixed[point.place.coordinates["task"]].metric_names()[1:])
    found = [(name, point.numbers(f"{what}.{name}")) for name in names]
    told = ", ".join(f"{name} {100 * _mean(numbers):.1f}" for name, numbers in found if numbers)
    return f" ({told})" if told else ""


def _costs(point: Point, extras: Sequence[str]) -> list[str]:
    """Legal answers in percent, trained numbers, bytes, seconds, and what else is asked for."""
    legal, row = point.numbers("test.legal_rate"), point.rows[0]
    return [
        f"{100 * _mean(legal):.0f}" if legal else "",
        f"{row['parameters']:,}",
        f"{row['extra'].get('bytes', 0):,}",
        f"{_mean(point.numbers('seconds')):.0f}",
        *(f"{_mean(found):.4g}" if (found := point.numbers(name)) else "" for name in extras),
    ]


def _matches(value: Mapping[str, Any], point: Point, on: str) -> bool:
    where = dict(value.get("where", {}))
    return where.pop("on", on) == on and all(
        point.place.coordinates.get(a) == label for a, label in where.items()
    )


def _spread(numbers: Sequence[float]) -> str:
    mean = f"{100 * statistics.fmean(numbers):.1f}"
    return f"{mean} ± {100 * statistics.stdev(numbers):.1f}" if len(numbers) > 1 else mean


def _mean(numbers: Sequence[float]) -> float:
    return statistics.fmean(numbers) if numbers else 0.0


def _provenance(points: Points) -> list[Block]:
    """Commits, versions, machines, hours; and the rows that were not read."""
    rows = points.rows()
    blocks: list[Block] = [Heading(2, "Provenance")]
    commits = sorted({r["provenance"]["commit"][:12] + " (dirty)" * r["provenance"]["dirty"] for r in rows})
    versions, machines = (
        sorted({", ".join(f"{k} {v}" for k, v in r["provenance"][key].items()) for r in rows})
        for key in ("versions", "machine")
    )
    seeds = sorted({int(row["seed"]) for row in rows if row["seed"] != VOTED})
    hours = sum(float(row["seconds"]) for row in rows) / 3600
    backbones = sorted({f"{row['backbone']['name']} ({row['backbone']['parameters']:,})" for row in rows})
    told = [
        ["commits", "; ".join(commits)],
        ["versions", "; ".join(versions)],
        ["machines", "; ".join(machines)],
        ["seeds", ", ".join(map(str, seeds))],
        ["hours", f"{hours:.2f}"],
        ["backbones", "; ".join(backbones)],
        [
            "data hashes",
            str(len({h for row in rows for k, h in row["data"].items() if k.startswith("task")})),
        ],
    ]
    blocks.append(Table(["what", "is"], told))
    if points.aside:
        counts = ", ".join(f"{count} of {reason}" for reason, count in points.aside.items())
        blocks.append(
            Text(f"Records left aside, because they are not of these settings, data and backbones: {counts}.")
        )
    return blocks
