"""Artifacts -> an ensemble: made, compared with its members, and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from incipit import artifact, ensemble, files
from incipit.artifact import Artifact
from incipit.backbones import Backbone
from incipit.ensemble import Comparison, Ensemble
from incipit.errors import ArtifactError
from incipit.evaluation import DecodeOptions
from incipit.run.parts import examples_of, text_form
from incipit.tasks.metrics import METRICS
from incipit.tasks.task import Task


@dataclass(frozen=True)
class Ensembled:
    """place: "" where it was not written. comparison: on `split`, read once."""

    name: str
    place: str
    ensemble: Ensemble
    split: str
    comparison: Comparison

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """As an artifact's card holds them."""
        return {self.split: self.comparison.ensemble}


def combine(
    members: Sequence[Artifact],
    backbone: Backbone,
    task: Task,
    method: str = "vote",
    *,
    weights: Sequence[float] = (),
    split: str = "test",
    options: DecodeOptions | None = None,
    name: str = "",
    place: files.PathLike = "",
    overwrite: bool = False,
) -> Ensembled:
    """Mix the members on one task, score them and their ensemble on `split`, and write it where a place is given.

    weights: of the method "weighted"; without any, each member weighs as much as its THE metric on validation. The
    method "average" writes an ordinary artifact. Members of other tasks answer in the words of `task`.
    """
    ensemble.check_members(members)
    prompts = ensemble.prompts_for(members, backbone, task.labels)
    options = options or DecodeOptions()
    if method == "weighted" and not weights:
        weights = _accuracies(backbone, Ensemble(prompts), task, options)
    made = Ensemble(prompts, method, tuple(weights))
    examples = examples_of(task, split)
    found = ensemble.compare(
        backbone, made, examples, task.metrics,
        mode=options.mode, options=options.generate, batch=options.batch,
    )  # fmt: skip
    name = name or "+".join(member.name for member in members)[:80]
    done = Ensembled(name, str(place), made, split, found)
    if str(place):
        _write(done, members, backbone, task, overwrite)
    return done


def _accuracies(backbone: Backbone, made: Ensemble, task: Task, options: DecodeOptions) -> list[float]:
    """Each member's THE metric on validation, from 0 on."""
    metric = task.metrics[0]
    if metric == "perplexity" or not METRICS[metric].higher_is_better:
        raise ArtifactError(f"weights by {metric} are not defined: give --weights")
    found = ensemble.compare(
        backbone, made, examples_of(task, "validation"), [metric],
        mode=options.mode, options=options.generate, batch=options.batch,
    )  # fmt: skip
    return [max(0.0, one[metric]) for one in found.members]


def _write(
    done: Ensembled, members: Sequence[Artifact], backbone: Backbone, task: Task, overwrite: bool
) -> None:
    data = {"task": task.data_hash}
    form = text_form(task)
    if done.ensemble.method != "average":
        ensemble.save(
            done.place, name=done.name, ensemble=done.ensemble, members=members, task=form,
            scores=done.scores, data=data, overwrite=overwrite,
        )  # fmt: skip
        return
    (prompt,) = done.ensemble.readers
    origin = {"method": "average", "members": {m.name: m.digest for m in members}}
    artifact.save(
        done.place, prompt=prompt, backbone=backbone, name=done.name, task=form, recipe=_shared_recipe(members),
        scores=done.scores, data=data, origin=origin, overwrite=overwrite,
    )  # fmt: skip


def _shared_recipe(members: Sequence[Artifact]) -> dict[str, Any]:
    """The recipe of all members, up to name and seed; {} where they were trained differently."""

    def plain(member: Artifact) -> dict[str, Any]:
        table = {k: v for k, v in member.card.get("recipe", {}).items() if k not in ("name", "seed")}
        train = {k: v for k, v in table.get("train", {}).items() if k != "seeds"}
        return {**table, "train": train}

    first = members[0]
    same = all(plain(member) == plain(first) for member in members)
    return {k: v for k, v in first.card.get("recipe", {}).items() if k != "seed"} if same else {}
