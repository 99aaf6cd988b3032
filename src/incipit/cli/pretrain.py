"""incipit pretrain: raw text -> a small backbone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from incipit.cli import options


def pretrain(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A TOML file; its keys are in docs/cli.md.")
    ],
    settings: options.Settings = [],  # noqa: B006 (typer copies it)
    folder: Annotated[Path | None, options.folder("Without it: runs/NAME.")] = None,
    resume: options.Resume = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train a small backbone on raw text.

    Prints the folder of the finished model. Relative paths of corpus and validation start at the folder of
    the recipe.
    """
    from incipit import files
    from incipit import pretrain as pretraining
    from incipit.recipe import settings_of

    table = _placed(files.read_toml(recipe), recipe.parent)
    chosen = settings_of(pretraining.PretrainSettings, table, settings, str(recipe))
    if quiet:
        chosen = dataclasses.replace(chosen, fit=dataclasses.replace(chosen.fit, show=False))
    typer.echo(pretraining.pretrain(chosen, folder or Path("runs") / chosen.name, resume=resume))


def _placed(table: dict[str, Any], base: Path) -> dict[str, Any]:
    """The table with the paths of its text files joined to `base`."""
    for key in ("corpus", "validation"):
        if isinstance(table.get(key), list):
            table[key] = [str(base / path) if isinstance(path, str) else path for path in table[key]]
    return table
