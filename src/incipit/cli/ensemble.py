"""incipit ensemble: prompts of one backbone as one predictor, compared with its members."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from incipit.cli import opened, options, output
from incipit.cli.options import option, unset

if TYPE_CHECKING:
    from incipit.artifact import Artifact
    from incipit.recipe import Recipe
    from incipit.run import Ensembled
    from incipit.tasks.task import Task


class Method(StrEnum):
    """How the members' answers become one."""

    vote = "vote"
    logits = "logits"
    weighted = "weighted"
    average = "average"
    fixed = "fixed"
    sesom = "sesom"


How = Annotated[
    Method | None,
    unset(
        "--method",
        "METHOD",
        "vote: the majority, ties by summed probability. logits: mean of the label scores. weighted: the "
        "same with --weights. average: one prompt, the mean of their numbers. fixed, sesom: weights learned on "
        "the shots of --recipe, the same for all inputs or for each. Without it: the recipe's, or vote.",
    ),
]
Weights = Annotated[
    str,
    unset(
        "--weights",
        "W,W,...",
        "method weighted: one number for each artifact. Without it: the score of each on validation.",
    ),
]
Target = Annotated[
    str,
    unset(
        "--task",
        "NAME|FILE",
        "A built-in task, or a recipe or task file; prompts of other tasks answer in its words. Without "
        "it: the task that all artifacts share.",
    ),
]
RecipeFile = Annotated[
    Path | None,
    unset(
        "--recipe",
        "RECIPE",
        "A recipe with [task] and [ensemble]: the target, its shots, and how weights are learned there.",
    ),
]
Split = Annotated[str, option("--split", "SPLIT", "What to score: validation or test.")]
Name = Annotated[str, unset("--name", "NAME", "Its name. Without it: the members' names, or the recipe's.")]
Folder = Annotated[Path | None, options.folder("Write the ensemble here. Without it: only scores.")]


def ensemble(
    artifacts: options.Sources = [],  # noqa: B006 (typer copies it)
    method: How = None,
    weights: Weights = "",
    task: Target = "",
    recipe: RecipeFile = None,
    settings: options.Settings = [],  # noqa: B006 (typer copies it)
    split: Split = "test",
    name: Name = "",
    folder: Folder = None,
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
    if settings and recipe is None:
        raise typer.BadParameter("--set changes a key of a recipe; give --recipe RECIPE")
    if task and recipe is not None:
        raise typer.BadParameter("--recipe names a task already; leave out --task")
    given = _numbers(weights)
    from incipit import ensemble as ensembles
    from incipit import run
    from incipit.recipe import Recipe

    table = _table(Recipe.read(recipe, settings), method) if recipe is not None else None
    found = table.ensemble if table is not None else None
    chosen = method.value if method else found.method if found else "vote"
    if given and chosen != "weighted":
        raise typer.BadParameter(f"--weights are read by --method weighted only, this is {chosen}")
    places = artifacts or (list(found.sources) if found else [])
    if not places:
        raise typer.BadParameter("no ARTIFACT: give two or more, or a recipe with ensemble.sources")
    members = opened.artifacts(places)
    ensembles.check_members(members)
    model = opened.Backbones(backbone).of(members[0])
    where: dict[str, Any] = {"split": split, "name": name, "place": folder or "", "overwrite": overwrite}
    done: Ensembled
    if chosen in ensembles.GATED:
        if table is None:
            raise typer.BadParameter(
                f"--method {chosen} learns its weights: name the target with --recipe RECIPE"
            )
        done = run.learn(members, model, table, **where)
    else:
        source = table or opened.recipe_of(members[0])
        decoding = run.decode_options(source) if source is not None else None
        target = _target(members, task, table)
        done = run.combine(members, model, target, chosen, weights=given, options=decoding, **where)
    names = [member.name for member in members]
    _show(done, names)
    output.write(json, _told(done, names))


def _target(members: list[Artifact], task: str, recipe: Recipe | None) -> Task:
    """What the members answer: the task that is named, or the one that they share."""
    from incipit import ensemble as ensembles

    if recipe is not None:
        return recipe.load_task()
    if task:
        return opened.task_named(task)
    own = opened.own_task(members[0])
    ensembles.check_task(members, own.labels, own.spec.input)
    return own


def _table(recipe: Recipe, method: Method | None) -> Recipe:
    """The recipe with the method of the command line."""
    from incipit.recipe import EnsembleTable

    if method is None:
        return recipe
    chosen = (recipe.ensemble or EnsembleTable()).model_copy(update={"method": method.value})
    return recipe.model_copy(update={"ensemble": chosen})


def _told(done: Ensembled, names: list[str]) -> dict[str, Any]:
    more: dict[str, Any] = {key: getattr(done, key) for key in ("controls", "history") if key in vars(done)}
    return {
        "name": done.name,
        "place": done.place,
        "method": done.ensemble.method,
        "split": done.split,
        "weights": list(done.ensemble.weights),
        "members": names,
        "comparison": done.comparison.table(),
        **more,
    }


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
    if "controls" in vars(done):
        told = [[key, value] for key, value in vars(done)["controls"].items()]
        output.table(["control", "accuracy (entropy: nats)"], told)
    if done.place:
        typer.echo(f"written: {done.place}")
        _note_far_members(done.place)


def _note_far_members(place: str) -> None:
    """A server finds the members of an ensemble in its own library, which is where the ensemble lies."""
    from incipit import ensemble as ensembles

    far = ensembles.far_members(place) if ensembles.is_ensemble(place) else []
    if far:
        home = str(Path(place).parent)
        typer.echo(
            f"note: members outside {home!r}: {', '.join(map(repr, far))}; `incipit serve` finds the members of an "
            f"ensemble in its own library: copy them below {home!r}, or serve a folder that holds all of them",
            err=True,
        )
