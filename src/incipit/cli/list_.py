"""incipit list: every artifact, ensemble and ATTEMPT below a place; --near: how like one of them the others are."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from incipit.cli import options, output

if TYPE_CHECKING:
    from incipit.ensemble import Saved
    from incipit.library import Entry
    from incipit.transfer import SavedAttempt


class Measure(StrEnum):
    """How two prompts are compared."""

    average = "average"
    tokens = "tokens"


def list_(
    library: options.Library,
    near: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Show the prompts of this one's backbone by their similarity to it.",
            show_default=False,
        ),
    ] = "",
    measure: Annotated[
        Measure,
        typer.Option(
            help="--near: cosine of the mean rows (average), or mean cosine of all pairs of rows (tokens)."
        ),
    ] = Measure.average,
    figure: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="--near: also draw the similarity of every two: .png, .svg or .pdf.",
            show_default=False,
        ),
    ] = None,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """List the prompts of a library.

    Each is read and checked; a broken one is listed with its reason. Similar prompts are good starts for one another:
    prompt.start = "given" with prompt.source takes one, and a sweep over prompt.source finds the best of several.
    """
    if figure is not None and not near:
        raise typer.BadParameter("--figure draws similarities; give --near NAME")
    from incipit import library as libraries

    entries = libraries.entries(library)
    if near:
        _near(library, near, entries, measure, figure, json)
        return
    rows = [entry.row() for entry in entries]
    found = [*rows, *_others(library)]
    keys = ("name", "task", "backbone", "parameters")
    output.table(
        [*keys, "scores", "place"],
        [
            [*(row.get(key, "") for key in keys), _scores(row), row["place"]]
            if "broken" not in row
            else [row["name"], "", "", "", f"broken: {row['broken']}", row["place"]]
            for row in found
        ],
    )
    output.write(json, found)


def _near(
    library: str, name: str, entries: list[Entry], measure: Measure, figure: Path | None, json: Path | None
) -> None:
    """A line for each prompt of one backbone, the nearest first; and the square of all similarities."""
    from incipit import library as libraries
    from incipit import transfer

    target = libraries.find(library, name)
    whole = [entry.artifact for entry in entries if entry.artifact is not None]
    found = transfer.near(target, whole, measure.value)
    chosen = [target, *(one for one, _ in found)]
    square = transfer.similarities([transfer.rows_of(one) for one in chosen], measure.value)
    if figure is not None:
        transfer.draw([one.name for one in chosen], square, figure, f"cosine of prompts ({measure.value})")
    rows: list[dict[str, Any]] = [
        {
            "name": one.name,
            "similarity": value,
            "task": one.card["task"].get("name", ""),
            "scores": dict(one.card.get("scores", {})),
            "place": one.place,
        }
        for one, value in found
    ]
    output.table(
        [f"near {name}", "similarity", "task", "scores", "place"],
        [[row["name"], row["similarity"], row["task"], _scores(row), row["place"]] for row in rows],
    )
    if left := len(whole) - len(chosen):
        typer.echo(f"note: {left} prompts of another backbone or kind are not compared", err=True)
    output.write(
        json,
        {"near": name, "measure": measure.value, "prompts": rows, "names": [one.name for one in chosen],
         "similarity": square.tolist()},
    )  # fmt: skip


def _others(library: str) -> list[dict[str, Any]]:
    """A row for each ensemble and each ATTEMPT; a broken one with its reason."""
    from incipit import ensemble, files
    from incipit.errors import IncipitError
    from incipit.transfer import saved

    rows: list[dict[str, Any]] = []
    if files.is_remote(library):
        return rows
    kinds: tuple[tuple[str, Callable[[str], Saved | SavedAttempt]], ...] = (
        (ensemble.CARD, ensemble.load), (saved.CARD, saved.load),
    )  # fmt: skip
    for place, load in [(place, load) for mark, load in kinds for place in files.list_folders(library, mark)]:
        try:
            rows.append(_other(load(place)))
        except IncipitError as error:
            rows.append({"name": Path(place).name, "place": place, "broken": str(error)})
    return rows


def _other(found: Saved | SavedAttempt) -> dict[str, Any]:
    from incipit.ensemble import Saved

    if isinstance(found, Saved):
        made_of = {
            "parameters": f"{found.card['method']} of {len(found.members)}",
            "members": [member.name for member in found.members],
        }
    else:
        made_of = {
            "parameters": found.card.get("parameters", 0),
            "sources": [one.get("name", "") for one in found.card["sources"] if isinstance(one, dict)],
        }
    return {
        "name": found.name, "place": found.place, "task": found.task.get("name", ""),
        "kind": found.task.get("kind", ""), "backbone": found.card["backbone"]["name"],
        "scores": found.card.get("scores", {}),
    } | made_of  # fmt: skip


def _scores(row: dict[str, Any]) -> str:
    """THE metric of the last split that was scored, test before validation."""
    scored = [(split, row["scores"][split]) for split in ("test", "validation") if row["scores"].get(split)]
    return next((f"{split} {output.scores(dict([*v.items()][:1]))}" for split, v in scored), "")
