"""incipit tune: recipes -> prompts, scored and saved; with --sweep or --seeds every combination, and the best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from incipit.cli import options, output

if TYPE_CHECKING:
    from incipit.run import Spread, Swept, Tuned


def tune(
    recipes: options.Recipes,
    settings: options.Settings = [],  # noqa: B006 (typer copies it)
    sweep: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=VALUE,VALUE",
            help="Train at each of these values of a key of the recipe, as in lr=0.01,0.03,0.1. Given several "
            "times: at every combination. The best on validation is scored on test.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 (typer copies it)
    seeds: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Train with the seeds 0 to N-1 in place of the recipe's, and show mean and deviation.",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        options.folder(
            "Where artifacts, records and checkpoints go. Without it: runs/NAME, of several runs/NAME+NAME."
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
    options.check_again(resume, overwrite)
    from incipit.recipe import Recipe
    from incipit.recipe.sweeps import axes

    over = axes(sweep)
    read = [Recipe.read(path, settings) for path in recipes]
    from incipit import run

    place = folder or Path("runs") / "+".join(recipe.name for recipe in read)
    if not over and seeds is None:
        tuned = run.tune(read, place, resume=resume, overwrite=overwrite, show=not quiet)
        _show_prompts(tuned)
        output.write(json, _prompts(tuned))
        return
    chosen = range(seeds) if seeds is not None else None
    swept = run.sweep(read, over, place, seeds=chosen, resume=resume, overwrite=overwrite, show=not quiet)
    _show_sweep(swept)
    output.write(
        json, {"combinations": swept.table(), "figure": swept.figure, "prompts": _prompts(swept.tuned)}
    )


def _show_prompts(tuned: list[Tuned]) -> None:
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


def _show_sweep(swept: Swept) -> None:
    """A line for each combination; then the best, its artifacts and the figure."""
    rows = [
        [
            row.name,
            row.metric,
            len(row.seeds),
            *_cells(row.dev),
            *_cells(row.test),
            "best" if row.best else "",
        ]
        for row in swept.rows
    ]
    columns = ["combination", "metric", "seeds", "dev mean", "dev sd", "test mean", "test sd", ""]
    output.table(columns, rows)
    for row in swept.best:
        places = [
            one.place for one in swept.tuned if one.record["settings"]["name"] == row.name and one.place
        ]
        typer.echo(f"best on dev: {row.name}{': ' if places else ''}{', '.join(places)}")
    typer.echo(f"figure: {swept.figure}" if swept.figure else swept.note, err=not swept.figure)


def _cells(spread: Spread | None) -> tuple[float | None, float | None]:
    return (spread.mean, spread.deviation) if spread else (None, None)


def _prompts(tuned: list[Tuned]) -> list[dict[str, Any]]:
    keys = ("name", "seed", "place", "scores")
    return [{k: getattr(one, k) for k in keys} | {"record": one.record} for one in tuned]
