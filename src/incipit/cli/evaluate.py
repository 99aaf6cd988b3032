"""incipit evaluate: artifacts, or a backbone alone, and a task -> scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from incipit.cli import opened, options, output
from incipit.errors import DataError

if TYPE_CHECKING:
    from incipit.artifact import Artifact
    from incipit.backbones import Backbone
    from incipit.ensemble import Saved
    from incipit.tasks.example import Example
    from incipit.tasks.task import Task
    from incipit.transfer import SavedAttempt


def evaluate(
    artifacts: options.Judged = [],  # noqa: B006 (typer copies it)
    task: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="A built-in task, or a recipe or task file. Without it: the task of each artifact.",
            show_default=False,
        ),
    ] = "",
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="Other data in the form of the artifact's own task: a file, a folder, hub:owner/name:split.",
            show_default=False,
        ),
    ] = "",
    split: Annotated[str, typer.Option(metavar="SPLIT", help="train, validation or test.")] = "test",
    backbone: options.BackboneName = "",
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Score prompts on a split of a task, or a frozen model without any: what a prompt has to beat."""
    if task and data:
        raise typer.BadParameter("--task names a whole task and --data only other data; give one of them")
    if split not in ("train", "validation", "test"):
        raise typer.BadParameter(f"--split {split}: is no split; write train, validation or test")
    if not artifacts and not (task and backbone):
        raise typer.BadParameter(
            "name artifacts; or, to score a model without a prompt, --backbone and --task"
        )
    found = (
        _of_artifacts(artifacts, task, data, split, backbone) if artifacts else [_bare(task, split, backbone)]
    )
    shown = ("name", "task", "split", "examples")
    rows = [[*(one[key] for key in shown), output.scores(one["scores"])] for one in found]
    output.table(["prompt", *shown[1:], "scores"], rows)
    output.write(json, found)


def _of_artifacts(
    artifacts: Sequence[str], task: str, data: str, split: str, backbone: str
) -> list[dict[str, Any]]:
    """The results of prompts, ensembles and ATTEMPTs."""
    backbones = opened.Backbones(backbone)
    found = []
    for artifact in opened.readers(artifacts):
        chosen, examples = _examples(artifact, task, data, split)
        model = backbones.of(artifact)
        _same_classes(artifact, chosen, model.family)
        scores = _scores(artifact, model, chosen, examples)
        found.append(_result(artifact.name, artifact.place, chosen, split, examples, scores))
    return found


def _scores(
    artifact: Artifact | Saved | SavedAttempt, model: Backbone, chosen: Task, examples: Sequence[Example]
) -> dict[str, float]:
    """Answers are made as the artifact's recipe makes them."""
    from incipit import ensemble, evaluation, run
    from incipit.tasks import metrics
    from incipit.transfer import SavedAttempt

    recipe = opened.recipe_of(artifact)
    way = run.decode_options(recipe) if recipe is not None else evaluation.DecodeOptions()
    if isinstance(artifact, ensemble.Saved):
        return ensemble.compare(
            model, artifact.ensemble(model), examples, chosen.metrics,
            mode=way.mode, options=way.generate, batch=way.batch,
        ).ensemble  # fmt: skip
    if isinstance(artifact, SavedAttempt):
        made = artifact.attempt(model)
        said = made.predict(model, examples, way.batch, mode=way.mode, options=way.generate)
        return metrics.compute(chosen.metrics, [p.text for p in said], examples)
    (prompt,) = ensemble.prompts_for([artifact], model, chosen.labels)
    return evaluation.evaluate(model, prompt, examples, chosen.metrics, way, legality=True).scores


def _bare(task: str, split: str, backbone: str) -> dict[str, Any]:
    """The result of a frozen model as it is: no soft rows; an encoder reads out by the words of the task."""
    from incipit import evaluation, run
    from incipit.assemble import PromptChoice, make_prompt

    chosen = opened.task_named(task)
    examples = run.examples_of(chosen, split)
    model = opened.Backbones(backbone).named()
    none = make_prompt(PromptChoice(kind="none"), model, chosen.labels)
    scores = evaluation.evaluate(model, none, examples, chosen.metrics, legality=True).scores
    return _result("none", backbone, chosen, split, examples, scores)


def _result(
    name: str, place: str, chosen: Task, split: str, examples: Sequence[Example], scores: dict[str, float]
) -> dict[str, Any]:
    return {
        "name": name, "place": place, "task": chosen.name, "split": split, "examples": len(examples),
        "data": chosen.data_hash, "scores": scores,
    }  # fmt: skip


def _same_classes(artifact: Artifact | Saved | SavedAttempt, task: Task, family: str) -> None:
    """An encoder answers by its read-out: class i of it is label word i, so the words of another task need another one.

    A single prompt is read out anew, which a note says; what is made of several prompts is refused.
    """
    from incipit.artifact import Artifact

    words = tuple(artifact.card["task"].get("words", ()))
    if family != "encoder" or words == tuple(task.labels):
        return
    said = (
        f"{artifact.name!r} answers {', '.join(words)}; the task {task.name!r} has {', '.join(task.labels)}"
    )
    if not isinstance(artifact, Artifact):
        raise DataError(f"{said}: name a task with these label words in this order")
    typer.echo(f"note: {said}: read out by the words of the task", err=True)


def _examples(
    artifact: Artifact | Saved | SavedAttempt, task: str, data: str, split: str
) -> tuple[Task, Sequence[Example]]:
    """What it is scored on: a task, and one of its splits."""
    from incipit import run

    if task or data:
        chosen = opened.task_named(task) if task else opened.own_task(artifact, data, split)
        return chosen, run.examples_of(chosen, split)
    chosen = opened.own_task(artifact)
    try:
        examples = run.examples_of(chosen, split)
    except DataError as error:
        raise DataError(f"{error}; --data FILE or --task RECIPE names other data") from error
    known = artifact.card.get("data", {}).get("task")
    if known and known != chosen.data_hash:
        typer.echo(f"note: the data of {artifact.name!r} has changed since it was made", err=True)
    return chosen, examples
