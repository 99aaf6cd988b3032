"""incipit study: a grid of recipes, resumable; and the report that sets its records beside the published numbers."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from incipit.cli import options, output
from incipit.cli.options import option, unset

if TYPE_CHECKING:
    from incipit.study.plan import Study
    from incipit.study.report import Report


class Action(StrEnum):
    """What is done with a study."""

    run = "run"
    report = "report"


Actions = Annotated[
    Action,
    typer.Argument(
        metavar="run|report", help="Run what is not done yet, or write the report.", show_default=False
    ),
]
Name = Annotated[
    str,
    typer.Argument(metavar="STUDY", help="A folder, or the name of one below studies/.", show_default=False),
]
Scale = Annotated[str, option("--scale", "NAME", "A .toml file of the study: small, paper.")]
Only = Annotated[list[str], unset("--only", "EXPERIMENT", "This experiment alone. May be repeated.")]
Data = Annotated[Path, option("--data", "FOLDER", "Where the data sets are, a folder each.")]
Corpus = Annotated[
    str, unset("--corpus", "FOLDER", "run: raw text for the backbones that the study trains itself.")
]
Folder = Annotated[
    Path | None,
    options.folder("Where records, checkpoints and the report go. Without it: runs/STUDY-SCALE."),
]
Records = Annotated[
    list[Path],
    unset(
        "--records",
        "FILE",
        "report: records to read, in place of those of the folder, else of the study. May be repeated.",
    ),
]
StandIn = Annotated[
    str, unset("--stand-in", "BACKBONE", "run: this backbone in place of every one, to try a study.")
]
Most = Annotated[int, option("--limit", "N", "run: stop after N cells; 0: all.", min=0)]


def study(
    action: Actions,
    name: Name,
    scale: Scale = "small",
    only: Only = [],  # noqa: B006 (typer copies it)
    data: Data = Path("data"),
    corpus: Corpus = "",
    folder: Folder = None,
    records: Records = [],  # noqa: B006
    stand_in: StandIn = "",
    settings: options.Settings = [],  # noqa: B006
    limit: Most = 0,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Run a study, or report on it.

    A study is a grid of recipes. What is done is on record and not done again, so the same line goes on after any
    interruption; changed settings, data or backbones make new records and leave the old ones unread.
    """
    from incipit.study import comparison, grid
    from incipit.study.plan import Study, located

    if comparison.is_comparison(where := located(name)):
        _compare(action, where, folder, records, json)
        return
    made = Study.read(name, scale, data, settings)
    place = folder or Path("runs") / f"{made.folder.name}-{scale}"
    if action is Action.report:
        _report(made, place, only, records, json)
        return
    done = grid.run(made, place, only=only, corpus=corpus, stand_in=stand_in, limit=limit)
    counts = f"{len(done.ran)} cells run, {len(done.known)} done before"
    typer.echo(f"{counts}, in {done.seconds:.0f} s: {place / grid.RECORDS}")
    output.write(json, {"ran": done.ran, "known": done.known, "seconds": done.seconds})


def _report(made: Study, place: Path, only: list[str], records: list[Path], json: Path | None) -> None:
    """Write the pages, and show the verdicts."""
    from incipit import files
    from incipit.study import grid, report

    own = made.folder / "records" / f"{made.scale}.jsonl"
    found = (
        records or [p for p in (place / grid.RECORDS, own) if files.exists(p)][:1] or [place / grid.RECORDS]
    )
    _show(report.build(made, report.read_records(found), only), place, json)


def _compare(
    action: Action, where: Path, folder: Path | None, records: list[Path], json: Path | None
) -> None:
    """The page of a study whose methods are paired by a script of its own."""
    from incipit.study import comparison, report

    if action is Action.run:
        raise typer.BadParameter(
            f"the study {where.name!r} is run by {where / 'run.py'}; see its first lines, then `incipit study report`"
        )
    found = records or [where / "records" / "small.jsonl"]
    written = comparison.build(where, report.read_records(found))
    _show(written, folder or Path("runs") / f"{where.name}-small", json)


def _show(written: Report, place: Path, json: Path | None) -> None:
    from incipit.study import report

    pages = report.write(written, place)
    output.table(
        ["claim", "verdict", "evidence"], [[c.number, c.verdict, c.evidence] for c in written.claims]
    )
    typer.echo(f"{written.run} of {written.places} settings: {', '.join(map(str, pages))}")
    output.write(
        json, {"claims": [vars(c) for c in written.claims], "run": written.run, "places": written.places}
    )
