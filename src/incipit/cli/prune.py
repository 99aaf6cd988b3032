"""incipit prune: a trained prompt -> the same with fewer numbers, trained again and compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from incipit.cli import opened, options, output

if TYPE_CHECKING:
    from incipit.run import Pruned


Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a key of [prune], as in prune.rewind=initial, or of the recipe that trained the prompt, as in "
        "train.steps=200. May be repeated.",
        show_default=False,
    ),
]
SettingsFile = Annotated[
    Path | None,
    typer.Option("--settings", metavar="FILE", help="A TOML file with a [prune] table.", show_default=False),
]
Controls = Annotated[
    bool,
    typer.Option(
        "--controls",
        help="Also train the controls restart, random, reversed and shorter, and as many plain runs as there are "
        "token ratios: a training in full each.",
    ),
]


def prune(
    artifacts: options.Artifacts,
    settings: Settings = [],  # noqa: B006 (typer copies it)
    file: SettingsFile = None,
    controls: Controls = False,
    name: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Of the new artifact, where one is pruned. Without it: that of the old one, and -pruned.",
            show_default=False,
        ),
    ] = "",
    folder: Annotated[
        Path | None,
        options.folder(
            "Where the artifact, its table, figure and record go; of several, each in a folder of its name. "
            "Without it: runs/NAME."
        ),
    ] = None,
    backbone: options.BackboneName = "",
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    json: options.Json = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Prune tokens and pieces of prompts that `incipit tune` wrote, and train what is left again.

    Scores every token and piece on a prompt's own training data, tries ratios on validation, trains the best mask in
    full beside its controls, and scores each of them once on test (XPrompt, Ma et al. 2022).
    """
    options.check_again(resume, overwrite)
    from incipit import files, run
    from incipit.recipe import PruneTable
    from incipit.recipe.prunes import USUAL

    own = [text for text in settings if text.startswith("prune.")]
    table = PruneTable.of(files.read_toml(file) if file else {}, own, str(file) if file else "--set")
    if controls:
        table = table.model_copy(update={"controls": USUAL, "plain": len(table.token_ratios)})
    sources, backbones = opened.artifacts(artifacts), opened.Backbones(backbone)
    if name and len(sources) > 1:
        raise typer.BadParameter(
            f"--name {name}: here are {len(sources)} prompts; leave it out, or prune one"
        )
    told = []
    for source in sources:
        called = name or f"{source.name}-pruned"
        place = Path("runs") / called if folder is None else folder / called if len(sources) > 1 else folder
        found = run.prune(
            source, place, table, overrides=[text for text in settings if text not in own], name=called,
            backbone=backbones.of(source), resume=resume, overwrite=overwrite, show=not quiet,
        )  # fmt: skip
        _show(found)
        keys = ("name", "place", "cost", "figure")
        told.append({key: getattr(found, key) for key in keys} | {"rows": found.table()})
    output.write(json, told)


def _show(found: Pruned) -> None:
    """A line for each prompt that was tried, then where the pruned one is."""
    rows = [
        [
            row.stage,
            row.name,
            row.tokens,
            row.kept,
            row.steps,
            next(iter(row.dev.values()), None),
            next(iter(row.test.values()), None),
            "chosen" if row.chosen else "",
        ]
        for row in found.rows
    ]
    metric = next(iter(found.rows[0].dev), "score")
    output.table(
        ["stage", "prompt", "tokens", "numbers", "steps", f"dev {metric}", f"test {metric}", ""], rows
    )
    typer.echo(f"pruned: {found.place}")
    typer.echo(f"figure: {found.figure}" if found.figure else found.note, err=not found.figure)
