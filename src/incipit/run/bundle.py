"""Bundles: recipes trained together, each then scored, saved and put on record.

Recipes that share a backbone and a schedule train as one bundle: each recipe x seed is one trainee with its own data
order, optimiser, dev score and best checkpoint; a step is one batch that mixes all of them, and so is a score.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from incipit import artifact, files
from incipit.backbones import Backbone, autocast
from incipit.batch import Batch, Encoded, collate
from incipit.errors import RecipeError, StorageError, TrainingError
from incipit.evaluation import Evaluation, Trial, evaluate_all
from incipit.recipe import Recipe
from incipit.run.members import Data, Member, Tuned, keep, make_member, member_name
from incipit.run.parts import decode_options, load_backbone, objective, passes
from incipit.tasks.example import Example
from incipit.tasks.metrics import METRICS
from incipit.train import FitSettings, OptimSettings, Outcome, fit
from incipit.train.checkpoint import FILE as CHECKPOINT
from incipit.train.gradients import Collate, Objective
from incipit.train.trainee import FREE
from incipit.transfer.multitask import Row
from incipit.transfer.wayward import pulled, soft

Pair = tuple[Recipe, int]  # a recipe and one of its seeds


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
    recipe x seed, in that order. Raises RecipeError for no recipe or two of one name, TrainingError when the folder
    holds a run already and neither `resume` nor `overwrite` is given, StorageError when an artifact's place is taken.
    """
    bundles = plan(recipes, folder, backbone)
    for bundle in bundles:
        bundle.check_places(resume, overwrite)
    found = []
    for bundle in bundles:
        bundle.train(resume=resume, overwrite=overwrite, show=show)
        found += bundle.finish(lambda member: True)
    return ordered(found, recipes)


def plan(recipes: Sequence[Recipe], folder: files.PathLike, backbone: Backbone | None = None) -> list[Bundle]:
    """The fewest bundles that hold every recipe x seed; each has a folder of its own where there are several."""
    if not recipes:
        raise RecipeError("nothing to tune: give at least one recipe")
    names = [r.name for r in recipes]
    if len(set(names)) < len(names):
        raise RecipeError(f"two recipes are named {max(names, key=names.count)!r}: give each its own name")
    groups: dict[str, list[Pair]] = {}
    for recipe in recipes:
        for seed in recipe.train.seeds:
            groups.setdefault(_bundle_key(recipe, seed), []).append((recipe, seed))
    if backbone is not None and len(groups) > 1 and any(r.train.method != "prompt" for r in recipes):
        raise RecipeError(
            f"a backbone that is given can be tuned in one run, here are {len(groups)}: "
            "leave `backbone` out, and each run loads its own"
        )
    loaded: dict[str, Backbone] = {}

    def lent(recipe: Recipe) -> Backbone:
        if backbone is not None:
            return backbone
        if recipe.train.method != "prompt":  # a tuned model is not lent to the next bundle
            return load_backbone(recipe)
        key = recipe.backbone.model_dump_json()
        if key not in loaded:
            loaded[key] = load_backbone(recipe)
        return loaded[key]

    whole = Path(folder)
    return [
        Bundle(pairs, whole if len(groups) == 1 else whole / _folder_name(pairs), lent)
        for pairs in groups.values()
    ]


def ordered(tuned: Sequence[Tuned], recipes: Sequence[Recipe]) -> list[Tuned]:
    """Recipe by recipe, seed by seed, whatever bundle they were in."""
    places = {
        member_name(r, seed): n for n, (r, seed) in enumerate((r, s) for r in recipes for s in r.train.seeds)
    }
    return sorted(tuned, key=lambda one: places[one.name])


def _bundle_key(recipe: Recipe, seed: int) -> str:
    """Recipes with equal keys can train in one bundle; a model is tuned alone."""
    train = recipe.train.model_dump(exclude={"lr", "lr_absolute", "seeds", "eval_limit", "match"})
    kind = recipe.prompt.kind
    prompt = recipe.prompt.model_dump(include={"kind", "sites", "readout", "attention"})
    layout = recipe.prompt.layout  # may put rows beside keys and values, or none
    if kind == "input":  # rows behind an input are read with each, so that they would slow others down
        layout = "behind" if layout.partition("{input}")[2] else ""
    best = METRICS[recipe.spec.metric_names()[0]].higher_is_better
    alone = [recipe.name, seed] if recipe.train.method != "prompt" else []
    return files.sha256_json([recipe.backbone.model_dump(), train, prompt, layout, best, alone])


def _folder_name(pairs: Sequence[Pair]) -> str:
    """Where a bundle goes that is not the only one of its call."""
    whole = pairs[0][0].train.method != "prompt"
    names = [member_name(r, seed) if whole else r.name for r, seed in pairs]
    joined = "+".join(dict.fromkeys(names))
    return joined if len(joined) <= 80 else f"{joined[:70]}-{files.sha256_json(names)[:8]}"


class Bundle:
    """Recipes x seeds that train in one process on one frozen model: `check_places`, `train`, `finish`."""

    def __init__(self, pairs: Sequence[Pair], folder: Path, lent: Callable[[Recipe], Backbone]) -> None:
        self.pairs, self.folder, self._lent = list(pairs), folder, lent
        self.names = [member_name(r, seed) for r, seed in pairs]
        self.members: list[Member] = []
        self.outcomes: list[Outcome] = []  # of each member; they outlive `release`
        self._backbone: Backbone | None = None
        self._seconds = 0.0

    @property
    def whole(self) -> bool:
        """Whether it changes the model itself, which then belongs to it."""
        return self.pairs[0][0].train.method != "prompt"

    def check_places(self, resume: bool, overwrite: bool) -> None:
        """Before a long training: an artifact will find its place free, or may replace an artifact there."""
        there = files.exists(self.folder / CHECKPOINT)
        if there and not resume and not overwrite:
            raise TrainingError(
                f"{str(self.folder)!r} holds a run already: pass --resume to go on with it, --overwrite to "
                "replace it, or choose another folder"
            )
        again = overwrite or (resume and there)
        for name in self.names:
            if files.exists(self.folder / name) and not again:
                raise StorageError(
                    f"{str(self.folder / name)!r} exists already: choose another folder, or pass --overwrite"
                )
            artifact.check_replaceable(self.folder / name)

    def train(self, *, resume: bool = False, overwrite: bool = False, show: bool = True) -> None:
        """All members step together; at the end each holds its best tensors."""
        started = time.monotonic()
        backbone = self._backbone = self._lent(self.pairs[0][0])
        for note in backbone.notes if show else ():
            print(f"note: {note}", file=sys.stderr)
        data = Data(backbone)
        self.members = [make_member(recipe, seed, data) for recipe, seed in self.pairs]
        self.outcomes = fit_members(
            self.members, backbone, self.folder, resume=resume, overwrite=overwrite, show=show
        )
        self._seconds = (time.monotonic() - started) / len(self.members)

    def release(self) -> None:
        """Let go of the model that was tuned; `finish` reads it again from the checkpoint."""
        self.members, self._backbone = [], None

    @property
    def backbone(self) -> Backbone:
        """The model with the best tensors of its members, after `train`."""
        assert self._backbone is not None, "train first"
        return self._backbone

    def judge(self, examples: Sequence[Example], metrics: Sequence[str]) -> dict[str, Evaluation]:
        """Every member, with its best tensors, on other examples than its own; by its name."""
        trials = [Trial(m.prompt, examples, metrics, decode_options(m.recipe)) for m in self.members]
        with precision_of(self.members, self.backbone):
            found = evaluate_all(self.backbone, trials)
        return {m.name: one for m, one in zip(self.members, found, strict=True)}

    def finish(self, tested: Callable[[Member], bool]) -> list[Tuned]:
        """Score the test split once, of the chosen members in the same batches; write artifacts and records."""
        if self._backbone is None:
            seconds = self._seconds
            self.train(resume=True, show=False)
            self._seconds = seconds
        assert self._backbone is not None
        scores = scored([m for m in self.members if tested(m)], self._backbone, "test", legality=True)
        return [
            keep(m, o, self._backbone, self.folder, self._seconds, scores.get(m.name))
            for m, o in zip(self.members, self.outcomes, strict=True)
        ]


def fit_members(
    members: Sequence[Member],
    backbone: Backbone,
    folder: Path,
    *,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    show: bool = True,
) -> list[Outcome]:
    """Members of one schedule step together until each holds its best tensors; `identity`: see `fit`."""
    if members[0].recipe.train.checkpointing:
        backbone.recompute()
    processes = Accelerator()
    if overwrite and not resume and processes.is_main_process:
        files.remove_run(folder)
    processes.wait_for_everyone()

    def evaluate(live: Sequence[int]) -> dict[int, dict[str, float]]:
        found = scored([members[k] for k in live], backbone, "validation")
        return {k: found[members[k].name] for k in live if members[k].name in found}

    recipes = list({m.recipe.name: m.recipe for m in members}.values())
    same = {
        "backbone": backbone.fingerprint,
        "recipes": [_same(r) for r in recipes],
        "data": {m.name: m.data["task"] if m.mixture is None else m.data for m in members},
    }
    return fit(
        [m.trainee for m in members], _objective(members, backbone), fit_settings(members, backbone, show),
        folder, collating(backbone, mixed=members[0].mixture is not None), evaluate=evaluate,
        identity=same | dict(identity or {}), resume=resume,
        allow=[f"recipes.{n}.decode.batch" for n in range(len(recipes))],  # as train.micro_batch: memory alone
    )  # fmt: skip


def precision_of(members: Sequence[Member], backbone: Backbone) -> AbstractContextManager[object]:
    """What scores are computed in: of a tuned model as it was trained, for nobody reads it again."""
    train = members[0].recipe.train
    return autocast(backbone.device, "float32" if train.method == "prompt" else train.precision)


def scored(
    members: Sequence[Member], backbone: Backbone, split: str, *, legality: bool = False
) -> dict[str, dict[str, float]]:
    """Name of a member -> its scores on a split, all in the same batches; without that split it is left out."""
    trials = {(m.name, task): trial for m in members for task, trial in m.trials(split).items()}
    if not trials:
        return {}
    with precision_of(members, backbone):
        found = evaluate_all(backbone, list(trials.values()), legality=legality)
    each: dict[str, dict[str, dict[str, float]]] = {}
    for (name, task), one in zip(trials, found, strict=True):
        each.setdefault(name, {})[task] = one.scores
    return {m.name: m.scores(each[m.name]) for m in members if m.name in each}


def collating(backbone: Backbone, mixed: bool = False) -> Collate:
    """Rows of several members, or of one mixture's tasks, -> a Batch."""

    def together(encoded: Sequence[Encoded], rows: Sequence[int]) -> Batch:
        if mixed:
            rows = [e.task if isinstance(e, Row) else 0 for e in encoded]
        return collate(encoded, rows, pad_id=backbone.pad_id)

    return together


def _objective(members: Sequence[Member], backbone: Backbone) -> Objective:
    """The members' loss; with train.wayward each is pulled to the rows it starts at."""
    prompts = [prompt for m in members for prompt in m.prompts]
    plain, gammas = objective(backbone, prompts), [m.recipe.train.wayward or 0.0 for m in members]
    if not any(gammas):
        return plain
    anchors = [
        soft(p).detach().clone() if p is not None and g else None
        for p, g in zip(prompts, gammas, strict=True)
    ]
    return pulled(plain, prompts, anchors, gammas)


def _same(recipe: Recipe) -> Mapping[str, Any]:
    """What of a recipe must not change when its run is resumed."""
    table = recipe.table()
    train = {k: v for k, v in table["train"].items() if k not in FREE}
    return {**table, "train": train}


def fit_settings(members: Sequence[Member], backbone: Backbone, show: bool) -> FitSettings:
    """How members of one schedule are trained."""
    member = members[0]
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
        **passes(backbone, [prompt for m in members for prompt in m.prompts], t.memory, t.precision),
        save_every=t.save_every,
        save_minutes=t.save_minutes,
        show=show,
        tensorboard=t.tensorboard,
    )
