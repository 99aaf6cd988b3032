"""incipit transfer: a task learned from prompts of other tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from incipit.cli import opened, options, output

RecipeFile = Annotated[
    Path,
    typer.Option(metavar="RECIPE", help="The target: [task], [train], and [transfer] with the method."),
]


def transfer(
    recipe: RecipeFile,
    artifacts: options.Sources = [],  # noqa: B006 (typer copies it)
    settings: options.Settings = [],  # noqa: B006
    folder: Annotated[Path | None, options.folder("Where all of it goes. Without it: runs/NAME.")] = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    json: options.Json = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Learn a task from prompts of other tasks on the same frozen model.

    spot: the prompt starts as the one that is most like the task's own, or as the best of several (Vu et al. 2022).
    attempt: every input gets a mixture of the sources (Asai et al. 2022). multitask: a shared prompt is distilled from
    the sources on their own tasks and tuned on this one (Wang et al. 2023). `predict` and `evaluate` take the result.
    """
    options.check_again(resume, overwrite)
    from incipit import run
    from incipit.recipe import Recipe

    target = Recipe.read(recipe, settings)
    places = artifacts or (list(target.transfer.sources) if target.transfer else [])
    members = opened.artifacts(places)
    found = run.transfer(
        members,
        target,
        folder or Path("runs") / target.name,
        resume=resume,
        overwrite=overwrite,
        show=not quiet,
    )
    rows = [
        [row.name, row.similarity, *(output.scores(row.scores.get(s, {})) for s in ("validation", "test")),
         "chosen" if row.chosen else ""]
        for row in found.rows
    ]  # fmt: skip
    if rows:
        output.table(["started from", "similarity", "validation", "test", ""], rows)
    else:
        output.table(["split", "scores"], [[s, output.scores(one)] for s, one in found.scores.items()])
    typer.echo(f"{found.method}: {found.place}")
    told = {"rows": found.record["extra"]["transfer"]["rows"]}
    output.write(json, {k: getattr(found, k) for k in ("name", "method", "place", "scores")} | told)
