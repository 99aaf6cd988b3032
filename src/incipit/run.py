"""Recipe -> artifact + record: the only place where all parts meet.

Recipes that share a backbone and a schedule train as one bundle: each recipe x seed is one trainee with its own data
order, optimiser, dev score and best checkpoint; a step is one batch that mixes all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from incipit import artifact, files, record
from incipit.assemble import PromptChoice, make_prompt
from incipit.backbones import Backbone, EncoderBackbone, GenerateOptions, load
from incipit.batch import Batch, Encoded, collate
from incipit.decode import stacked
from incipit.encode import encode
from incipit.errors import DataError, RecipeError
from incipit.evaluation import DecodeOptions, evaluate
from incipit.prompts import Prompt
from incipit.recipe import Recipe
from incipit.tasks.example import Example
from incipit.tasks.metrics import METRICS
from incipit.tasks.task import Task
from incipit.train import ExampleStream, FitSettings, OptimSettings, Outcome, PassStream, Stream, Trainee, fit


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

    backbone: a loaded one, used for all recipes. Returns one Tuned per recipe x seed, in that order.
    Raises TrainingError when the folder holds a run already and neither `resume` nor `overwrite` is given.
    """
    if not recipes:
        raise RecipeError("nothing to tune: give at least one recipe")
    names = [r.name for r in recipes]
    if len(set(names)) < len(names):
        raise RecipeError(f"two recipes are named {max(names, key=names.count)!r}: give each its own name")
    groups: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        groups.setdefault(_bundle_key(recipe), []).append(recipe)
    found: dict[str, list[Tuned]] = {}
    loaded: dict[str, Backbone] = {}
    for members in groups.values():
        place = Path(folder) if len(groups) == 1 else Path(folder) / "+".join(r.name for r in members)[:80]
        key = members[0].backbone.model_dump_json()
        whole = members[0].train.method == "model"
        if backbone is not None:
            used = backbone
        elif whole or key not in loaded:  # a tuned model is not lent to the next bundle
            used = load_backbone(members[0])
            if not whole:
                loaded[key] = used
        else:
            used = loaded[key]
        for tuned in _tune_bundle(members, used, place, resume=resume, overwrite=overwrite, show=show):
            found.setdefault(tuned.record["settings"]["name"], []).append(tuned)
    return [t for r in recipes for t in found[r.name]]


def load_backbone(recipe: Recipe) -> Backbone:
    """The backbone that a recipe names."""
    b = recipe.backbone
    return load(b.name, dtype=b.dtype, device=b.device, revision=b.revision or None, trust_code=b.trust_code)


def prompt_choice(recipe: Recipe) -> PromptChoice:
    """The recipe's [prompt] table as a PromptChoice."""
    p = recipe.prompt

    def given(backbone: Backbone) -> Tensor:
        from incipit.interop.given import rows_of

        return rows_of(p.source, backbone)

    return PromptChoice(
        kind=p.kind,
        length=p.length,
        start=p.start,
        text=p.text,
        given=given if p.start == "given" else None,
        layout=p.layout,
        sites=tuple(p.sites),
        reparametrise=p.reparametrise,
        hidden=p.hidden,
        vocabulary=p.vocabulary,
        readout=p.readout,
    )


def decode_options(recipe: Recipe) -> DecodeOptions:
    """The recipe's [decode] table as DecodeOptions."""
    d = recipe.decode
    generate = GenerateOptions(d.max_new_tokens, d.beams, d.sample, d.temperature, d.top_p, d.top_k, d.seed)
    return DecodeOptions(d.mode, d.batch, generate)


def text_form(task: Task) -> dict[str, Any]:
    """What an artifact keeps of its task, enough to answer new inputs."""
    spec = task.spec
    return {
        "name": task.name,
        "kind": task.kind,
        "input": spec.input,
        "description": spec.description,
        "words": list(task.labels),
        "metrics": list(task.metrics),
        "choices": spec.choices if isinstance(spec.choices, str) else list(spec.choices),
    }


def _bundle_key(recipe: Recipe) -> str:
    """Recipes with equal keys can train in one bundle."""
    train = recipe.train.model_dump(exclude={"lr", "lr_absolute", "seeds"})
    prompt = recipe.prompt.model_dump(include={"kind", "sites", "readout"})
    best = METRICS[recipe.load_task().metrics[0]].higher_is_better
    alone = recipe.name if recipe.train.method == "model" else ""
    return files.sha256_json([recipe.backbone.model_dump(), train, prompt, best, alone])


def _tune_bundle(
    recipes: Sequence[Recipe], backbone: Backbone, folder: Path, *, resume: bool, overwrite: bool, show: bool
) -> list[Tuned]:
    started = time.monotonic()
    if overwrite and not resume:
        files.remove_run(folder)
    members = [_member(recipe, seed, backbone) for recipe in recipes for seed in recipe.train.seeds]
    prompts = [m.prompt for m in members]

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
    train = {
        k: v
        for k, v in table["train"].items()
        if k not in ("micro_batch", "save_every", "save_minutes", "tensorboard")
    }
    return {**table, "train": train}


def _member(recipe: Recipe, seed: int, backbone: Backbone) -> _Member:
    task = recipe.load_task()
    choice = prompt_choice(recipe)
    train, whole = recipe.train, recipe.train.method == "model"
    prompt = make_prompt(choice, backbone, task.labels, seed)
    name = recipe.name if len(recipe.train.seeds) == 1 else f"{recipe.name}-s{seed}"
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
    head = {
        n: recipe.prompt.head_lr / rate
        for n, p in module.named_parameters()
        if p.requires_grad
        and n.rsplit(".", 1)[-1] in ("vectors", "bias")
        and isinstance(backbone, EncoderBackbone)
        and not n.startswith("0.")
        and "inner" not in n
    }
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
    """Score the test split once, write the artifact and the record."""
    task, recipe, prompt = member.task, member.recipe, member.prompt
    scores: dict[str, dict[str, float]] = {}
    if outcome.scores:
        scores["validation"] = dict(outcome.scores)
    if len(task.test):
        options = decode_options(recipe)
        scores["test"] = evaluate(backbone, prompt, task.test, task.metrics, options, legality=True).scores
    table = recipe.table() | {"seed": member.seed}
    data = {"task": task.data_hash}
    place = ""
    if recipe.train.method == "prompt":
        assert prompt is not None
        place = artifact.save(
            folder / member.name,
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
    row = record.append(
        folder / "record.jsonl",
        record.Record(
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
        ),
    )
    return Tuned(member.name, member.seed, place, prompt, scores, outcome, row)


def _extra(outcome: Outcome) -> Mapping[str, Any]:
    return {"steps": outcome.steps, "best_step": outcome.best_step, "best_score": outcome.best_score}


def examples_of(task: Task, split: str) -> Sequence[Any]:
    """A split that must be there; DataError names the ones that are."""
    rows = task.examples(split)
    if not len(rows):
        raise DataError(f"task {task.name!r} has no {split} split; it has {', '.join(task.splits) or 'none'}")
    return rows
