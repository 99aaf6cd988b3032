"""A task that is learned from prompts of other tasks: SPoT, ATTEMPT, multi-task prompt tuning, by one recipe.

found = transfer([artifact.load("runs/a/a"), artifact.load("runs/b/b")], Recipe.read("target.toml"), "runs/target")
found.place   # what predict and evaluate take
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from incipit import artifact, files, record
from incipit.artifact import Artifact
from incipit.backbones import Backbone
from incipit.ensemble import check_members, check_names
from incipit.errors import ArtifactError, DataError, PromptError, RecipeError, StorageError
from incipit.evaluation import Trial, evaluate_all
from incipit.prompts import MultitaskPrompt, Prompt
from incipit.prompts.masked import rewrapped
from incipit.recipe import Recipe, TransferTable
from incipit.run.bundle import fit_settings, tune
from incipit.run.members import Data, Member, make_member
from incipit.run.parts import decode_options, drawn, load_backbone, text_form
from incipit.tasks.metrics import METRICS, compute
from incipit.transfer import (
    Attempt,
    Shared,
    fit_attempt,
    fit_shared,
    next_start,
    saved,
    similarities,
    soft_rows,
)
from incipit.transfer.multitask import shared_within

RECORDS = "record.jsonl"
OWN = "its own start"
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class TransferRow:
    """One prompt that was tried. similarity: of its source to the task's own prompt, where that was asked for."""

    name: str
    similarity: float | None
    scores: Scores
    chosen: bool = False


@dataclass(frozen=True)
class Transferred:
    """What came out. place: an artifact (spot, multitask) or a saved ATTEMPT. rows: everything that was tried."""

    name: str
    method: str
    place: str
    scores: Scores
    rows: list[TransferRow] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)


def transfer(
    members: Sequence[Artifact],
    recipe: Recipe,
    folder: files.PathLike,
    *,
    backbone: Backbone | None = None,
    resume: bool = False,
    overwrite: bool = False,
    show: bool = True,
) -> Transferred:
    """Learn the recipe's task from these prompts, as its [transfer] table says; write the result below `folder`.

    Raises RecipeError without that table, ArtifactError for members of several backbones, DataError for a task without
    training examples, or without validation where something is chosen on it.
    """
    if recipe.transfer is None:
        raise RecipeError(f"{recipe.name}: no [transfer] table says how; write one with method and sources")
    _check(members, recipe.transfer)
    place = Path(folder) / recipe.name
    if files.exists(place) and not (overwrite or resume):
        raise StorageError(f"{str(place)!r} exists already: choose another folder, or pass --overwrite")
    started, model = time.monotonic(), backbone or load_backbone(recipe)
    for member in members:  # before anything is trained
        artifact.check_backbone("prompt", member.card, model)
    data = Data(model)
    if not len(data.task(recipe).train):
        raise DataError(f"task {recipe.spec.name!r}: no example to learn from; its train split is empty")
    job = _Job(members, recipe, recipe.transfer, data, Path(folder), resume, overwrite, show)
    found = {"spot": job.spot, "attempt": job.attempt, "multitask": job.multitask}[recipe.transfer.method]()
    return job.recorded(found, time.monotonic() - started)


def _check(members: Sequence[Artifact], table: TransferTable) -> None:
    """ArtifactError for no member, too few, or members that do not go together."""
    least = 2 if table.method == "multitask" else 1
    if len(members) < least:
        raise ArtifactError(
            f'{len(members)} sources: the method "{table.method}" needs {least} or more artifacts of one backbone; '
            "name them on the command line or in transfer.sources"
        )
    if len(members) > 1:
        check_members(members)
        check_names(members)


@dataclass
class _Job:
    """One recipe on its way."""

    members: Sequence[Artifact]
    recipe: Recipe
    table: TransferTable
    data: Data
    folder: Path
    resume: bool
    overwrite: bool
    show: bool

    @property
    def backbone(self) -> Backbone:
        return self.data.backbone

    @property
    def place(self) -> Path:
        return self.folder / self.recipe.name

    # -- SPoT ------------------------------------------------------------------------------------------------------

    def spot(self) -> Transferred:
        """Vu et al. 2022: the prompt starts as that of another task."""
        searched = self.table.pick == "search"
        if searched and not len(self.data.task(self.recipe).validation):
            raise DataError(
                f'task {self.recipe.spec.name!r}: transfer.pick = "search" chooses on validation, which it lacks: name '
                'task.validation, set task.split.validation=0.1, or pick by "similarity"'
            )
        (own,) = self._tuned("own", [self.recipe.varied({"name": f"{self.recipe.name}-own"})])
        assert own.prompt is not None
        tables = [soft_rows(own.prompt), *(soft_rows(m.prompt(self.backbone)) for m in self.members)]
        alike = similarities(tables)[0, 1:].tolist()
        order = sorted(range(len(alike)), key=lambda k: -alike[k])
        chosen = order[: self.table.top or len(order)] if searched else order[:1]
        tuned = self._tuned("candidates", [self._from(self.members[k], len(tables[k + 1])) for k in chosen])
        metric = self.data.task(self.recipe).metrics[0]
        sign = 1 if METRICS[metric].higher_is_better else -1
        best = max(
            range(len(tuned)), key=lambda n: sign * tuned[n].scores.get("validation", {metric: 0.0})[metric]
        )
        rows = [TransferRow(OWN, None, own.scores)]
        rows += [
            TransferRow(self.members[k].name, alike[k], one.scores, n == best)
            for n, (k, one) in enumerate(zip(chosen, tuned, strict=True))
        ]
        rows += [TransferRow(self.members[k].name, alike[k], {}) for k in order if k not in chosen]
        prompt = tuned[best].prompt
        assert prompt is not None
        self._save(prompt, tuned[best].scores, {"chosen": self.members[chosen[best]].name})
        return Transferred(self.recipe.name, "spot", str(self.place), tuned[best].scores, rows)

    def _tuned(self, name: str, recipes: Sequence[Recipe]) -> Any:
        plain = [one.model_copy(update={"transfer": None}) for one in recipes]
        return tune(plain, self.folder / name, resume=self.resume, overwrite=self.overwrite, show=self.show,
                    backbone=self.backbone)  # fmt: skip

    def _from(self, member: Artifact, length: int) -> Recipe:
        start = {
            "prompt.start": "given",
            "prompt.source": member.place,
            "prompt.text": "",
            "prompt.length": length,
        }
        return self.recipe.varied({"name": f"{self.recipe.name}-from-{member.name}", **start})

    # -- ATTEMPT ---------------------------------------------------------------------------------------------------

    def attempt(self) -> Transferred:
        """Asai et al. 2022: the task's own rows, at the recipe's start, and a mixture of the sources for each input."""
        member = self._member()
        assert member.prompt is not None
        sources = [m.prompt(self.backbone) for m in self.members]
        made = Attempt.of(member.prompt, sources, self.table.inner, member.seed).to(self.backbone.device)

        def dev(attempt: Attempt) -> dict[str, float]:
            return self._answered(attempt, "validation")

        settings = fit_settings([member], self.backbone, self.show)
        fit_attempt(
            self.backbone, made, member.task.train, settings, self._run("run"), resume=self.resume,
            gate_lr=self.table.gate_lr, dev=dev if member.dev is not None else None, seed=member.seed,
        )  # fmt: skip
        made.eval()
        scores = {s: self._answered(made, s) for s in ("validation", "test") if len(member.task.examples(s))}
        if Accelerator().is_main_process:
            saved.save(
                self.place, attempt=made, sources={m.name: m.digest for m in self.members}, backbone=self.backbone,
                name=self.recipe.name, task=text_form(member.task), recipe=self._settings(), scores=scores,
                data={"task": member.task.data_hash}, overwrite=self.overwrite or self.resume,
            )  # fmt: skip
        return Transferred(self.recipe.name, "attempt", str(self.place), scores)

    def _answered(self, attempt: Attempt, split: str) -> dict[str, float]:
        task, way = self.data.task(self.recipe), decode_options(self.recipe)
        examples = list(task.examples(split))
        said = attempt.predict(self.backbone, examples, way.batch, mode=way.mode, options=way.generate)
        return compute(task.metrics, [p.text for p in said], examples)

    # -- multi-task prompt tuning ----------------------------------------------------------------------------------

    def multitask(self) -> Transferred:
        """Wang et al. 2023: a shared prompt learned from the sources on their own tasks, then tuned on this one."""
        teachers = [m.prompt(self.backbone) for m in self.members]
        rows = [soft_rows(teacher) for teacher in teachers]
        if len({len(one) for one in rows}) > 1:
            told = ", ".join(f"{m.name} {len(one)}" for m, one in zip(self.members, rows, strict=True))
            raise PromptError(
                f"sources of several lengths share no rows ({told}): tune them with one prompt.length"
            )
        start = self._shared(teachers, rows)
        member = self._member(
            {"prompt.length": start.length, "prompt.start": "uniform", "prompt.text": "", "prompt.source": ""}
        )
        assert member.prompt is not None
        prompt = rewrapped(member.prompt, lambda _: copy.deepcopy(start))  # type: ignore[arg-type, return-value]
        prompt = prompt.to(self.backbone.device)
        way, task = decode_options(self.recipe), member.task
        dev = drawn(task.validation, self.recipe.train.eval_limit)
        only = Shared(
            member.name, prompt, task.train, dev, task.metrics[0], way.mode, way.generate, way.batch
        )
        settings = replace(
            fit_settings([replace(member, prompt=prompt)], self.backbone, self.show), best="max"
        )
        fit_shared(self.backbone, [only], settings, self._run("run"), seed=member.seed, resume=self.resume)
        splits = [s for s in ("validation", "test") if len(member.task.examples(s))]
        trials = [Trial(prompt, member.task.examples(s), member.task.metrics, way) for s in splits]
        scores = {s: one.scores for s, one in zip(splits, evaluate_all(self.backbone, trials), strict=True)}
        self._save(prompt, scores, {})
        return Transferred(self.recipe.name, "multitask", str(self.place), scores)

    def _shared(self, teachers: Sequence[Prompt], rows: Sequence[torch.Tensor]) -> MultitaskPrompt:
        """The start of one more task: the shared part, and the mean of the tasks' factors."""
        recipes = [_own_recipe(member) for member in self.members]
        first = MultitaskPrompt(
            self.backbone.geometry,
            "low_rank",
            len(rows[0]),
            self.table.rank,
            torch.stack(list(rows)).mean(dim=0),
        )
        inner = [first, *(first.sibling(seed) for seed in range(1, len(rows)))]
        students = [
            rewrapped(teacher, lambda _, own=own: own).to(self.backbone.device)  # type: ignore[misc]
            for teacher, own in zip(teachers, inner, strict=True)
        ]
        for student in students:
            for parameter in shared_within(student).parameters():
                parameter.requires_grad_(True)
        tasks = [
            Shared(m.name, prompt, r.load_task().train)
            for m, prompt, r in zip(self.members, students, recipes, strict=True)
        ]
        settings = replace(
            fit_settings([self._member()], self.backbone, self.show),
            steps=self.table.shared_steps,
            patience=0,
        )
        fit_shared(
            self.backbone, tasks, settings, self._run("shared"), seed=self.recipe.train.seeds[0], resume=self.resume,
            teachers=teachers if self.table.distil else (), weight=self.table.distil, hidden=self.table.hidden,
        )  # fmt: skip
        return shared_within(next_start(students))

    # -- what all share --------------------------------------------------------------------------------------------

    def _member(self, changes: Mapping[str, Any] | None = None) -> Member:
        recipe = self.recipe.varied(changes) if changes else self.recipe
        return make_member(recipe, self.recipe.train.seeds[0], self.data)

    def _run(self, name: str) -> Path:
        """A folder for a training; emptied where its run is to be replaced."""
        place = self.folder / name
        if self.overwrite and not self.resume and Accelerator().is_main_process:
            files.remove_run(place)
        return place

    def _settings(self) -> dict[str, Any]:
        return {**self.recipe.table(), "seed": self.recipe.train.seeds[0]}

    def _save(self, prompt: Prompt, scores: Scores, more: Mapping[str, Any]) -> None:
        task = self.data.task(self.recipe)
        origin = {"method": self.table.method, "members": {m.name: m.digest for m in self.members}, **more}
        if Accelerator().is_main_process:
            artifact.save(
                self.place, prompt=prompt, backbone=self.backbone, name=self.recipe.name, task=text_form(task),
                recipe=self._settings(), scores=scores, data={"task": task.data_hash}, origin=origin,
                overwrite=self.overwrite or self.resume,
            )  # fmt: skip

    def recorded(self, found: Transferred, seconds: float) -> Transferred:
        """With a row in record.jsonl."""
        task, model = self.data.task(self.recipe), self.backbone
        kept = {"name": model.name, "fingerprint": model.fingerprint, "parameters": model.parameters}
        extra = {
            "method": found.method, "members": {m.name: m.digest for m in self.members},
            "rows": [asdict(row) for row in found.rows],
        }  # fmt: skip
        new = record.Record(
            found.name, self.recipe.train.seeds[0], found.scores, self._settings(), {"task": task.data_hash}, kept,
            round(seconds, 2), extra={"transfer": extra},
        )  # fmt: skip
        main = Accelerator().is_main_process
        return replace(found, record=record.append(self.folder / RECORDS, new) if main else record.row(new))


def _own_recipe(member: Artifact) -> Recipe:
    """The recipe in a card: the data that a source was trained on."""
    table = {k: v for k, v in member.card.get("recipe", {}).items() if k != "seed"}
    if not table:
        raise ArtifactError(
            f"the card of {member.place!r} names no recipe, so there is no data to learn a shared prompt from: give "
            "prompts that `incipit tune` wrote"
        )
    return Recipe.of(table, (), source=f"the recipe in the card of {member.place}")
