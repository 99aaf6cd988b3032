"""incipit show: what an artifact is, and what its rows say."""

from __future__ import annotations

from collections.abc import Sequence
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

    Its card, the words nearest to each row by cosine, sizes, rows that are the same or share their neighbours, and
    where the label words are. A size of 1 is the RMS of the backbone's word embeddings. "tight" is the mean cosine of
    a row's neighbours to one another; those of random vectors are said beside it. A prefix prompt has keys and values
    in place of rows: their sizes are shown against their start.
    """
    from incipit import anatomy

    (artifact,) = opened.artifacts([place])
    model = opened.Backbones(backbone).of(artifact)
    found = anatomy.inspect(artifact.prompt(model), model, neighbours, artifact.words)
    if figure is not None:
        anatomy.draw(found, figure, artifact.name)
    card = artifact.card
    facts = [
        ("name", artifact.name),
        ("backbone", card["backbone"]["name"]),
        ("task", f"{card['task'].get('name', '')} ({card['task'].get('kind', '')})"),
        ("input", card["task"].get("input", "")),
        *([("behind the input", f"the last {found.behind} rows")] if found.behind else []),
        ("label words", ", ".join(artifact.words)),
        ("parameters", card.get("parameters", "")),
        *((split, output.scores(values)) for split, values in card.get("scores", {}).items()),
        ("rows that share neighbours", _said(found.shared)),
        ("tightness of random vectors", found.random_tightness if found.rows else None),
        ("same rows", _said(found.duplicates)),
    ]
    output.table(["", artifact.place], facts)
    if found.rows:
        rows = [
            [
                row.position,
                row.norm,
                row.text,
                row.tightness,
                "  ".join(f"{w} {c:.2f}" for w, c in row.neighbours),
            ]
            for row in found.rows
        ]
        output.table(["row", "size", "constant", "tight", "nearest words"], rows)
    if found.labels:
        told = [
            [
                one.word,
                one.position,
                one.cosine,
                one.rank,
                one.home_rank,
                " ".join(map(str, one.near)) or "none",
            ]
            for one in found.labels
        ]
        started = card.get("recipe", {}).get("prompt", {}).get("start") == "label"
        home = "rank at its start" if started else "rank at row of its number"
        output.table(["label word", "nearest row", "cosine", "rank there", home, "rows near it"], told)
    if found.layers:
        output.table(["part", "size"], [[layer.part, layer.norm] for layer in found.layers])
    output.write(json, {"place": artifact.place, "card": dict(card), "anatomy": found.table()})


def _said(groups: Sequence[Sequence[int]]) -> str:
    return "; ".join(" = ".join(map(str, group)) for group in groups) or "none"
