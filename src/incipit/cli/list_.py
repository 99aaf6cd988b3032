"""incipit list: every artifact below a place."""

from __future__ import annotations

from typing import Annotated

import typer

from incipit.cli import options, output


def list_(
    library: Annotated[
        str,
        typer.Argument(metavar="LIBRARY", help="A folder with artifacts at any depth, or an fsspec address."),
    ],
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """List the prompts of a library.

    Each is read and checked; a broken one is listed with its reason.
    """
    from incipit import library as libraries

    rows = [entry.row() for entry in libraries.entries(library)]
    keys = ("name", "task", "backbone", "parameters")
    output.table(
        [*keys, "scores", "place"],
        [
            [*(row.get(key, "") for key in keys), _scores(row), row["place"]]
            if "broken" not in row
            else [row["name"], "", "", "", f"broken: {row['broken']}", row["place"]]
            for row in rows
        ],
    )
    output.write(json, rows)


def _scores(row: dict[str, dict[str, dict[str, float]]]) -> str:
    """THE metric of the last split that was scored, test before validation."""
    scored = [(split, row["scores"][split]) for split in ("test", "validation") if row["scores"].get(split)]
    return next((f"{split} {output.scores(dict([*v.items()][:1]))}" for split, v in scored), "")
