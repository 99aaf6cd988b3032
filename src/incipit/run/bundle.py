"""Bundles: recipes trained together, each then scored, saved and put on record.

Recipes that share a backbone and a schedule train as one bundle: each recipe x seed is one trainee with its own data
order, optimiser, dev score and best checkpoint; a step is one batch that mixes all of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from incipit import artifact, files, record
from incipit.assemble import make_prompt
from incipit.backbones import Backbone
from incipit.batch import Batch, Encoded, collate
from incipit.decode import stacked
from incipit.encode import encode
from incipit.errors import RecipeError, StorageError, TrainingError
from incipit.evaluation import evaluate
from incipit.prompts import Prompt, Reading
from incipit.recipe import Recipe
from incipit.run.parts import decode_options, load_backbone, prompt_choice, text_form
from incipit.tasks.example import Example
from incipit.tasks.metrics import METRICS
from incipit.tasks.task import Task
from incipit.train import ExampleStream, FitSettings, OptimSettings, Outcome, PassStream, Stream, Trainee, fit
from incipit.train.checkpoint import FILE as CHECKPOINT
from incipit.train.trainee import FREE


@dataclass(frozen=True)
class Tuned:
    """One trained prompt (or tuned model). place: its artifact, "" for a tuned model. scores: split -> metric."""

    name: str
    seed: int
    place: str
    prompt: Prompt | None
    scores: dict[str, dict[str, float]]
    outcome: Outcome
    record: dict[str, Any]


@dataclass
class _Member:
    """One recipe x seed of a bundle."""

    recipe: Recipe
    seed: int
    name: str
    task: Task
    prompt: Prompt | None
    trainee: Trainee


def tune(
    recipes: Sequence[Recipe],
    folder: files.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    show: bool = True,
    backbone: Backbone | None = None,
) -> list[Tuned]:
    """Train every recipe x seed, evaluate, and write artifacts and records below `folder`.

    backbone: a loaded one, used for all recipes; model tuning changes it in place. Returns one Tuned per
    recipe x seed, in that order. Raises TrainingError when the folder holds a run already and neither `resume`
    nor `overwrite` is given, StorageError when an artifact's place is taken.
    """
    if not recipes:
        raise RecipeError("nothing to tune: give at least one recipe")
    names = [r.name for r in recipes]
    if len(set(names)) < len(names):
        raise RecipeError(f"two recipes are named {max(names, key=names.count)!r}: give each its own name")
    groups: dict[str, list[tuple[Recipe, int]]] = {}
    for recipe in recipes:
        for seed in recipe.train.seeds:
            groups.setdefault(_bundle_key(recipe, seed), []).append((recipe, seed))
    if backbone is not None and len(groups) > 1 and any(r.train.method == "model" for r in recipes):
        raise RecipeError(
            f"a backbone that is given can be tuned in one run, here are {len(groups)}: "
            "leave `backbone` out, and each run loads its own"
        )
    found: dict[str, list[Tuned]] = {}
    loaded: dict[str, Backbone] = {}
    for members in groups.values():
        place = Path(folder) if len(groups) == 1 else Path(folder) / _folder_name(members)
        first = members[0][0]
        key = first.backbone.model_dump_json()
        if backbone is not None:
            used = backbone
        elif first.train.method == "model":  # a tuned model is not lent to the next bundle
            used = load_backbone(first)
        else:
            used = loaded[key] = loaded.get(key) or load_backbone(first)
        for note in used.notes if show else ():
            print(f"note: {note}", file=sys.stderr)
        for tuned in _tune_bundle(members, used, place, resume=resume, overwrite=overwrite, show=show):
            found.setdefault(tuned.record["settings"]["name"], []).append(tuned)
    return [t for r in recipes for t in found[r.name]]


def _bundle_key(recipe: Recipe, seed: int) -> str:
    """Recipes with equal keys can train in one bundle; a model is tuned alone."""
    train = recipe.train.model_dump(exclude={"lr", "lr_absolute", "seeds"})
    prompt = recipe.prompt.model_dump(include={"kind", "sites", "readout"})
    best = METRICS[recipe.load_task().metrics[0]].higher_is_better
    alone = [recipe.name, seed] if recipe.train.method == "model" else []
    return files.sha256_json([recipe.backbone.model_dump(), train, prompt, best, alone])


def _name(recipe: Recipe, seed: int) -> str:
    """The artifact's name: the recipe's, with the seed where there are several."""
    return recipe.name if len(recipe.train.seeds) == 1 else f"{recipe.name}-s{seed}"


def _folder_name(members: Sequence[tuple[Recipe, int]]) -> str:
    """Where a bundle goes that is not the only one of its call."""
    whole = members[0][0].train.method == "model"
    names = [_name(r, seed) if whole else r.name for r, seed in members]
    joined = "+".join(dict.fromkeys(names))
    return joined if len(joined) <= 80 else f"{joined[:70]}-{files.sha256_json(names)[:8]}"


def _check_places(names: Sequence[str], folder: Path, resume: bool, overwrite: bool) -> None:
    """Before a long training: an artifact will find its place free, or may replace an artifact there."""
    there = files.exists(folder / CHECKPOINT)
    if there and not resume and not overwrite:
        raise TrainingError(
            f"{str(folder)!r} holds a run already: pass --resume to go on with it, --overwrite to replace it, or "
            "choose another folder"
        )
    again = overwrite or (resume and there)
    for name in names:
        if files.exists(folder / name) and not again:
            raise StorageError(
                f"{str(folder / name)!r} exists already: choose another folder, or pass --overwrite"
            )
        artifact.check_replaceable(folder / name)


def _tune_bundle(
    chosen: Sequence[tuple[Recipe, int]],
    backbone: Backbone,
    folder: Path,
    *,
    resume: bool,
    overwrite: bool,
    show: bool,
) -> list[Tuned]:
    started = time.monotonic()
    _check_places([_name(r, seed) for r, seed in chosen], folder, resume, overwrite)
    recipes = {r.name: r for r, _ in chosen}.values()
    tasks = {r.name: r.load_task() for r in recipes}  # read once, whatever the number of seeds
    members = [_member(recipe, seed, backbone, tasks[recipe.name]) for recipe, seed in chosen]
    prompts = [m.prompt for m in members]
    processes = Accelerator()
    if overwrite and not resume and processes.is_main_process:
        files.remove_run(folder)
    processes.wait_for_everyone()

    def objective(batch: Batch) -> tuple[Tensor, Tensor]:
        return backbone.loss(batch, stacked(prompts, batch.rows))

    def together(encoded: Sequence[Encoded], rows: Sequence[int]) -> Batch:
        return collate(encoded, rows, pad_id=backbone.pad_id)

    settings = _settings(members[0], show)
    identity = {
        "backbone": backbone.fingerprint,
        "recipes": [_same(r) for r in recipes],
        "data": {m.name: m.task.data_hash for m in members},
    }
    outcomes = fit(
        [m.trainee for m in members], objective, settings, folder, together, identity=identity, resume=resume
    )
    seconds = time.monotonic() - started
    return [
        _finish(m, o, backbone, folder, seconds / len(members))
        for m, o in zip(members, outcomes, strict=True)
    ]


def _same(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe must not change when its run is resumed."""
    table = recipe.table()
    train = {k: v for k, v in table["train"].items() if k not in FREE}
    return {**table, "train": train}


def _member(recipe: Recipe, seed: int, backbone: Backbone, task: Task) -> _Member:
    choice = prompt_choice(recipe)
    train, whole = recipe.train, recipe.train.method == "model"
    prompt = make_prompt(choice, backbone, task.labels, seed)
    name = _name(recipe, seed)
    room = prompt.length if prompt is not None else 0

    def ready(example: Example) -> Encoded:
        return encode(backbone, example, room=room)

    validation = task.validation
    chosen = list(validation)[: train.eval_limit] if train.eval_limit else validation
    options = decode_options(recipe)

    def judge() -> dict[str, float]:
        return evaluate(backbone, prompt, chosen, task.metrics, options).scores

    units: dict[str, float] = {}
    module: nn.Module
    if whole:
        for parameter in backbone.model.parameters():
            parameter.requires_grad_(True)
        module = nn.ModuleList([backbone.model, *([prompt] if prompt is not None else [])])
    else:
        if prompt is None:
            raise RecipeError(
                'train.method = "prompt" with prompt.kind = "none" has nothing to train: '
                'choose "input" or "prefix", or train.method = "model"'
            )
        module = prompt
        units = prompt.units() if train.lr_absolute is None else {}
    rate = train.lr if train.lr_absolute is None else train.lr_absolute
    head = {}
    if isinstance(prompt, Reading) and prompt.trained:  # its rate is absolute, and undoes the trainee's own
        own = "1." if whole else ""
        head = {f"{own}{n}": recipe.prompt.head_lr / rate for n in ("vectors", "bias")}
    trainee = Trainee(
        name=name,
        module=module,
        stream=_stream(task, ready, seed),
        evaluate=judge if len(chosen) else None,
        units=units | head,
        lr=rate,
    )
    return _Member(recipe, seed, name, task, prompt, trainee)


def _stream(task: Task, ready: Callable[[Example], Encoded], seed: int) -> Stream:
    """The task's training rows, in memory or as they come."""
    if task.spec.streaming:
        return PassStream(lambda turn: task.stream(seed, turn), ready)
    return ExampleStream(task.train, ready, seed=seed)


def _settings(member: _Member, show: bool) -> FitSettings:
    t = member.recipe.train
    return FitSettings(
        steps=t.steps,
        batch=t.batch,
        optim=OptimSettings(
            name=t.optimiser,
            lr=t.lr,
            schedule=t.schedule,
            warmup=t.warmup,
            weight_decay=t.weight_decay,
            parameter_scale=t.method == "model",
        ),
        clip_norm=t.clip_norm,
        precision=t.precision,
        eval_every=t.eval_every,
        best="max" if METRICS[member.task.metrics[0]].higher_is_better else "min",
        patience=t.patience,
        micro_batch=t.micro_batch,
        save_every=t.save_every,
        save_minutes=t.save_minutes,
        show=show,
        tensorboard=t.tensorboard,
    )


def _finish(member: _Member, outcome: Outcome, backbone: Backbone, folder: Path, seconds: float) -> Tuned:
    """Score the test split once; the main process writes the artifact and the record."""
    task, recipe, prompt = member.task, member.recipe, member.prompt
    scores: dict[str, dict[str, float]] = {}
    if outcome.scores:
        scores["validation"] = dict(outcome.scores)
    if len(task.test):
        options = decode_options(recipe)
        scores["test"] = evaluate(backbone, prompt, task.test, task.metrics, options, legality=True).scores
    table = recipe.table() | {"seed": member.seed}
    data = {"task": task.data_hash}
    main = Accelerator().is_main_process
    place = str(folder / member.name) if recipe.train.method == "prompt" else ""
    if place and main:
        assert prompt is not None
        artifact.save(
            place,
            prompt=prompt,
            backbone=backbone,
            name=member.name,
            task=text_form(task),
            recipe=table,
            scores=scores,
            data=data,
            overwrite=True,
        )
    trained = sum(p.numel() for p in member.trainee.module.parameters() if p.requires_grad)
    new = record.Record(
        name=member.name,
        seed=member.seed,
        scores=scores,
        settings=table,
        data=data,
        seconds=round(seconds, 2),
        backbone={
            "name": backbone.name,
            "fingerprint": backbone.fingerprint,
            "parameters": backbone.parameters,
        },
        parameters=trained,
        extra=_extra(outcome),
    )
    path = folder / "record.jsonl"
    known = record.find(path, new)  # a run that was killed between its records, and resumed
    row = known or (record.append(path, new) if main else record.row(new))
    return Tuned(member.name, member.seed, place, prompt, scores, outcome, row)


def _extra(outcome: Outcome) -> Mapping[str, Any]:
    return {"steps": outcome.steps, "best_step": outcome.best_step, "best_score": outcome.best_score}
