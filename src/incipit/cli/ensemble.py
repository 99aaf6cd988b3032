"""incipit ensemble: prompts of one backbone as one predictor, compared with its members."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from incipit.cli import opened, options, output

if TYPE_CHECKING:
    from incipit.run import Ensembled


class Method(StrEnum):
    """How the members' answers become one."""

    vote = "vote"
    logits = "logits"
    weighted = "weighted"
    average = "average"


def ensemble(
    artifacts: options.Artifacts,
    method: Annotated[
        Method,
        typer.Option(
            help="vote: the majority, ties by summed probability. logits: mean of the label scores. weighted: the "
            "same with --weights. average: one prompt, the mean of their numbers."
        ),
    ] = Method.vote,
    weights: Annotated[
        str,
        typer.Option(
            metavar="W,W,...",
            help="method weighted: one number for each artifact. Without it: the score of each on validation.",
            show_default=False,
        ),
    ] = "",
    task: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="A built-in task, or a recipe or task file; prompts of other tasks answer in its words. Without "
            "it: the task that all artifacts share.",
            show_default=False,
        ),
    ] = "",
    split: Annotated[str, typer.Option(metavar="SPLIT", help="What to score: validation or test.")] = "test",
    name: Annotated[
        str,
        typer.Option(metavar="NAME", help="Its name. Without it: the members' names.", show_default=False),
    ] = "",
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write the ensemble here. Without it: only scores.", show_default=False
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    backbone: options.BackboneName = "",
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Answer with several prompts of one frozen model at once.

    Every prompt reads every input in the same batches, so the model stands in memory once. Shown are each member,
    their mean and best (on the split that is shown, as in the paper), the ensemble, and the oracle: right where any
    member is. The folder names the members by place and hash; `predict` and `evaluate` take it like an artifact.
    """
    if split not in ("validation", "test"):
        raise typer.BadParameter(f"--split {split}: write validation or test")
    if weights and method is not Method.weighted:
        raise typer.BadParameter(f"--weights are read by --method weighted only, this is {method.value}")
    given = _numbers(weights)
    from incipit import ensemble as ensembles
    from incipit import run

    members = opened.artifacts(artifacts)
    ensembles.check_members(members)
    chosen = opened.task_named(task) if task else opened.own_task(members[0])
    if not task:
        ensembles.check_task(members, chosen.labels, chosen.spec.input)
    recipe = opened.recipe_of(members[0])
    done = run.combine(
        members, opened.Backbones(backbone).of(members[0]), chosen, method.value, weights=given, split=split,
        options=run.decode_options(recipe) if recipe is not None else None,
        name=name, place=folder or "", overwrite=overwrite,
    )  # fmt: skip
    _show(done, [member.name for member in members])
    output.write(
        json,
        {
            "name": done.name, "place": done.place, "method": method.value, "task": chosen.name, "split": split,
            "weights": list(done.ensemble.weights), "members": [m.name for m in members],
            "comparison": done.comparison.table(),
        },
    )  # fmt: skip


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"--weights {text}: write numbers with commas, as 1,1,0.5") from None


def _show(done: Ensembled, names: list[str]) -> None:
    found = done.comparison
    rows = [[name, output.scores(one)] for name, one in zip(names, found.members, strict=True)]
    rows += [
        ["mean", output.scores(found.mean)],
        [f"best ({names[found.best_member]})", output.scores(found.best)],
        [f"ensemble ({done.ensemble.method})", output.scores(found.ensemble)],
        ["oracle", output.scores(found.oracle)],
    ]
    output.table(["prompt", done.split], rows)
    if done.place:
        typer.echo(f"written: {done.place}")
