"""incipit tune: recipes -> prompts, scored and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from incipit.cli import options, output


def tune(
    recipes: options.Recipes,
    settings: options.Settings = [],  # noqa: B006 (typer copies it)
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where artifacts, records and checkpoints go. Without it: runs/NAME.",
            show_default=False,
        ),
    ] = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    json: options.Json = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train the prompts of one or more recipes.

    Recipes that share a backbone and a schedule train together, one prompt for each seed. Every prompt is
    chosen on validation, scored once on test, and saved as an artifact.
    """
    if resume and overwrite:
        raise typer.BadParameter("--resume goes on with a run and --overwrite replaces it; give one of them")
    from incipit.recipe import Recipe

    read = [Recipe.read(path, settings) for path in recipes]
    from incipit import run

    place = folder or Path("runs") / "+".join(recipe.name for recipe in read)
    tuned = run.tune(read, place, resume=resume, overwrite=overwrite, show=not quiet)
    splits = [split for split in ("validation", "test") if any(split in one.scores for one in tuned)]
    rows = [
        [
            one.name,
            one.seed,
            one.outcome.best_step,
            *(output.scores(one.scores.get(s, {})) for s in splits),
            one.place,
        ]
        for one in tuned
    ]
    output.table(["prompt", "seed", "best step", *splits, "artifact"], rows)
    keys = ("name", "seed", "place", "scores")
    output.write(json, [{k: getattr(one, k) for k in keys} | {"record": one.record} for one in tuned])
