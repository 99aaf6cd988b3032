"""Ensembles whose weights are learned on few shots: sources, adapted or not, then a gate over what they say."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from incipit import artifact, ensemble, files
from incipit.artifact import Artifact
from incipit.backbones import Backbone
from incipit.batch import Batch, Encoded, collate
from incipit.encode import encode
from incipit.ensemble import Cached, Ensemble, GateSettings
from incipit.errors import DataError, RecipeError
from incipit.prompts import Prompt
from incipit.recipe import Recipe
from incipit.recipe.tables import EnsembleTable
from incipit.run.ensembles import Ensembled
from incipit.run.parts import decode_options, examples_of, objective, passes, text_form
from incipit.tasks.example import Example
from incipit.tasks.task import Task
from incipit.train import ExampleStream, FitSettings, OptimSettings, Trainee, fit


@dataclass(frozen=True)
class Learned(Ensembled):
    """An Ensembled with the controls of its gate (see `ensemble.controls`) and how its dev score went."""

    controls: dict[str, float]
    history: list[dict[str, float]]
    curve: dict[str, Any]


def learn(
    members: Sequence[Artifact],
    backbone: Backbone,
    recipe: Recipe,
    *,
    split: str = "test",
    name: str = "",
    place: files.PathLike = "",
    overwrite: bool = False,
    show: bool = False,
) -> Learned:
    """Train the gate of recipe.ensemble on the task's train split; score it on `split`; write it where asked.

    Only the gate is trained, unless `ensemble.adapt` trains a copy of each source first; those copies are written
    beside the ensemble, at PLACE-sources, for it names them as its members. A validation split chooses the gate's step.
    """
    e = recipe.ensemble
    if e is None or e.method not in ensemble.GATED:
        raise RecipeError(
            f'{recipe.name}: [ensemble] method = "sesom" or "fixed" is learned; write that table'
        )
    ensemble.check_members(members)
    if e.adapt:
        ensemble.check_names(members)
    task = recipe.load_task()
    shots = list(task.train)
    if not shots:
        raise DataError(
            f"task {task.name!r}: no shots to learn from; its train split is empty, or task.shots is 0"
        )
    prompts = ensemble.prompts_for(members, backbone, task.labels)
    gate = GateSettings(e.method, e.space, e.pool, e.inner, e.width, e.tau, e.log_probabilities, e.seed)
    batch = decode_options(recipe).batch
    if e.adapt:
        prompts, read = _adapted(prompts, backbone, recipe, shots, gate, batch, show)
    else:
        read = read_shots(backbone, prompts, shots, gate, batch)
    dev = read_shots(backbone, prompts, task.validation, gate, batch) if len(task.validation) else None
    ((made, outcome),) = ensemble.fit_gates(
        [gate], read, dev, steps=e.steps, lr=e.lr, weight_decay=e.weight_decay, show=show
    )
    mixture = Ensemble(tuple(prompts), e.method, gate=made)
    examples = examples_of(task, split)
    answers = ensemble.ask(backbone, prompts, examples, mode="rank", batch=batch)
    found = ensemble.compare(
        backbone, mixture, examples, task.metrics, mode="rank", batch=batch, answers=answers
    )
    told = ensemble.controls(made, mixture.cached(backbone, answers, examples, batch), e.seed)
    done = Learned(
        name or recipe.name, str(place), mixture, split, found, told, outcome.history, outcome.curve()
    )
    if str(place):
        _write(done, members, backbone, task, e, overwrite)
    return done


def read_shots(
    backbone: Backbone, prompts: Sequence[Prompt], examples: Sequence[Example], gate: GateSettings, batch: int
) -> Cached:
    """What a gate reads of these examples under these prompts."""
    if gate.space == "vocabulary":
        return ensemble.from_vocabulary(backbone, prompts, examples, gate, batch)
    answers = ensemble.ask(backbone, prompts, examples, mode="rank", batch=batch)
    return ensemble.from_answers(backbone, answers, examples, gate)


def folds_of(count: int, folds: int, seed: int) -> list[list[int]]:
    """The places 0..count-1 in `folds` parts of nearly equal size, in a seeded order."""
    if folds > count:
        raise DataError(
            f"{folds} folds of {count} shots leave some empty: set ensemble.folds to at most {count}"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [sorted(order[k::folds]) for k in range(folds)]


def _adapted(
    prompts: Sequence[Prompt],
    backbone: Backbone,
    recipe: Recipe,
    shots: list[Example],
    gate: GateSettings,
    batch: int,
    show: bool,
) -> tuple[tuple[Prompt, ...], Cached]:
    """Copies of the prompts trained on all shots, and what a gate reads of the shots.

    With folds it reads of each shot what copies say that were trained without the shot's fold.
    """
    assert recipe.ensemble is not None
    parts = folds_of(len(shots), recipe.ensemble.folds, gate.seed) if recipe.ensemble.folds else []
    subsets = [list(range(len(shots)))]
    subsets += [[i for i in range(len(shots)) if i not in part] for part in parts]
    copies = adapt(prompts, backbone, recipe, shots, subsets, show=show)
    if not parts:
        return tuple(copies[0]), read_shots(backbone, copies[0], shots, gate, batch)
    pieces = [
        read_shots(backbone, own, [shots[i] for i in part], gate, batch)
        for own, part in zip(copies[1:], parts, strict=True)
    ]
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece
    places = [i for part in parts for i in part]
    back = sorted(range(len(places)), key=places.__getitem__)
    return tuple(copies[0]), whole.select(back)


def adapt(
    prompts: Sequence[Prompt],
    backbone: Backbone,
    recipe: Recipe,
    shots: Sequence[Example],
    subsets: Sequence[Sequence[int]],
    *,
    show: bool = False,
) -> list[list[Prompt]]:
    """A copy of every prompt trained on every subset of the shots, all in one bundle: [subset][K].

    As [train] says, without a dev split; each copy has the order of rows of the recipe's first seed.
    """
    t = recipe.train
    copies = [[copy.deepcopy(prompt) for prompt in prompts] for _ in subsets]
    rate = t.lr if t.lr_absolute is None else t.lr_absolute
    trainees = []
    for s, (subset, own) in enumerate(zip(subsets, copies, strict=True)):
        for k, prompt in enumerate(own):
            for parameter in prompt.parameters():
                parameter.requires_grad_(True)

            def ready(example: Example, room: int = prompt.length) -> Encoded:
                return encode(backbone, example, room=room)

            stream = ExampleStream([shots[i] for i in subset], ready, seed=t.seeds[0])
            units = prompt.units() if t.lr_absolute is None else {}
            trainees.append(Trainee(f"source-{k}-part-{s}", prompt, stream, units, rate))
    everyone = [prompt for own in copies for prompt in own]

    def joined(encoded: Sequence[Encoded], rows: Sequence[int]) -> Batch:
        return collate(encoded, rows, pad_id=backbone.pad_id)

    optim = OptimSettings(t.optimiser, t.lr, t.schedule, t.warmup, weight_decay=t.weight_decay)
    settings = FitSettings(
        steps=t.steps, batch=t.batch, optim=optim, clip_norm=t.clip_norm, precision=t.precision,
        micro_batch=t.micro_batch, **passes(backbone, everyone, t.memory, t.precision), show=show,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        fit(trainees, objective(backbone, everyone), settings, scratch, joined)
    for prompt in everyone:
        prompt.eval()
    return copies


def _write(
    done: Learned,
    members: Sequence[Artifact],
    backbone: Backbone,
    task: Task,
    e: EnsembleTable,
    overwrite: bool,
) -> None:
    form, data = text_form(task), {"task": task.data_hash}
    named = list(members)
    if e.adapt:
        named = []
        for member, prompt in zip(members, done.ensemble.prompts, strict=True):
            origin = {"method": "adapted", "members": {member.name: member.digest}}
            where = artifact.save(
                f"{done.place}-sources/{member.name}", prompt=prompt, backbone=backbone,
                name=f"{member.name}-on-{done.name}", task=form, data=data, origin=origin, overwrite=overwrite,
            )  # fmt: skip
            named.append(artifact.load(where))
    ensemble.save(
        done.place, name=done.name, ensemble=done.ensemble, members=named, task=form, scores=done.scores,
        data=data, curve=done.curve, overwrite=overwrite,
    )  # fmt: skip
