"""incipit show: what an artifact is, and what its rows say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from incipit.cli import opened, options, output


def show(
    place: options.Artifact,
    neighbours: Annotated[int, typer.Option(min=0, metavar="N", help="Nearest words of each row.")] = 5,
    figure: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Also draw sizes and cosines: .png, .svg or .pdf.", show_default=False
        ),
    ] = None,
    backbone: options.BackboneName = "",
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Show what a prompt is made of.

    Its card, the words nearest to each row by cosine, sizes, and rows that are the same. A size of 1 is the
    RMS of the backbone's word embeddings. A prefix prompt has keys and values in place of rows: their sizes
    are shown against their start.
    """
    from incipit import anatomy

    (artifact,) = opened.artifacts([place])
    model = opened.Backbones(backbone).of(artifact)
    found = anatomy.inspect(artifact.prompt(model), model, neighbours)
    if figure is not None:
        anatomy.draw(found, figure, artifact.name)
    card = artifact.card
    facts = [
        ("name", artifact.name),
        ("backbone", card["backbone"]["name"]),
        ("task", f"{card['task'].get('name', '')} ({card['task'].get('kind', '')})"),
        ("input", card["task"].get("input", "")),
        ("label words", ", ".join(artifact.words)),
        ("parameters", card.get("parameters", "")),
        *((split, output.scores(values)) for split, values in card.get("scores", {}).items()),
        ("same rows", "; ".join(" = ".join(map(str, group)) for group in found.duplicates) or "none"),
    ]
    output.table(["", artifact.place], facts)
    if found.rows:
        rows = [
            [row.position, row.norm, row.text, "  ".join(f"{w} {c:.2f}" for w, c in row.neighbours)]
            for row in found.rows
        ]
        output.table(["row", "size", "constant", "nearest words"], rows)
    if found.layers:
        output.table(["part", "size"], [[layer.part, layer.norm] for layer in found.layers])
    output.write(json, {"place": artifact.place, "card": dict(card), "anatomy": found.table()})
