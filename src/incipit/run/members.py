"""One recipe x seed of a bundle: its prompt, its rows, its dev split, and what is kept of it at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from incipit import artifact, files, record
from incipit.assemble import make_prompt
from incipit.backbones import Backbone
from incipit.batch import Encoded
from incipit.encode import encode
from incipit.errors import RecipeError
from incipit.evaluation import Trial
from incipit.prompts import Prompt, Reading
from incipit.recipe import Recipe
from incipit.run.adapters import adapt
from incipit.run.mixture import Mixture, joined
from incipit.run.parts import decode_options, drawn, prompt_choice, text_form
from incipit.tasks.example import Example
from incipit.tasks.task import Task
from incipit.train import ExampleStream, Outcome, PassStream, Stream, Trainee

Ready = Callable[[Example], Encoded]


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


class Data:
    """The data of a bundle's tasks: read once, and made token ids once, whatever the number of members."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._tasks: dict[str, Task] = {}
        self._ready: dict[tuple[str, int], Ready] = {}

    def task(self, recipe: Recipe) -> Task:
        """The task of a recipe, one for all recipes that name the same data."""
        key = _task_key(recipe)
        if key not in self._tasks:
            self._tasks[key] = recipe.load_task()
        return self._tasks[key]

    def mixed(self, recipe: Recipe) -> dict[str, Task]:
        """The tasks of a recipe's mixture; its own is the one of `task`."""
        return recipe.load_mixed() | {recipe.spec.name: self.task(recipe)}

    def ready(self, recipe: Recipe, room: int) -> Ready:
        """Example -> ids with `room` positions left to the prompt, kept for the members that ask again."""
        if self.task(recipe).spec.streaming:
            return lambda example: encode(self.backbone, example, room=room)
        key = _task_key(recipe), room
        return self._ready.setdefault(key, _kept(self.backbone, room))


def _task_key(recipe: Recipe) -> str:
    return files.sha256_json([recipe.table()["task"], recipe.base])


def _kept(backbone: Backbone, room: int) -> Ready:
    known: dict[int, tuple[Example, Encoded]] = {}  # the example too: its id is its own while it lives

    def ready(example: Example) -> Encoded:
        if id(example) not in known:
            known[id(example)] = example, encode(backbone, example, room=room)
        return known[id(example)][1]

    return ready


@dataclass
class Member:
    """One recipe x seed. dev: what it is chosen on, None without a validation split."""

    recipe: Recipe
    seed: int
    name: str
    task: Task
    prompt: Prompt | None
    trainee: Trainee
    dev: Trial | None
    mixture: Mixture | None = None

    @property
    def prompts(self) -> list[Prompt | None]:
        """What its rows read: its prompt, or one for each task of a mixture."""
        return [self.prompt] if self.mixture is None else list(self.mixture.prompts)

    @property
    def data(self) -> dict[str, str]:
        """Hashes of its data, task by task."""
        if self.mixture is None:
            return {"task": self.task.data_hash}
        return {f"task:{name}": task.data_hash for name, task in self.mixture.tasks.items()}

    def trials(self, split: str) -> dict[str, Trial]:
        """What it is scored on: "validation" or "test", by task of its mixture; {} without that split."""
        if self.mixture is not None:
            limit = self.recipe.train.eval_limit if split == "validation" else 0
            return self.mixture.trials(split, decode_options(self.recipe), limit)
        own = self.dev if split == "validation" else self.test
        return {} if own is None else {"": own}

    def scores(self, found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """The scores of its trials as one table, THE metric first."""
        return dict(found[""]) if self.mixture is None else joined(found)

    @property
    def test(self) -> Trial | None:
        """What it is scored on once, at the end; None without a test split."""
        if not len(self.task.test):
            return None
        return Trial(self.prompt, self.task.test, self.task.metrics, decode_options(self.recipe))


def member_name(recipe: Recipe, seed: int) -> str:
    """The artifact's name: the recipe's, with the seed where there are several."""
    return recipe.name if len(recipe.train.seeds) == 1 else f"{recipe.name}-s{seed}"


def make_member(recipe: Recipe, seed: int, data: Data, given: Prompt | None = None, name: str = "") -> Member:
    """A prompt at its start with its own order of rows; the backbone's weights or adapters with other methods.

    given: a prompt to train in place of the recipe's own start, under a name of its own.
    """
    backbone, task = data.backbone, data.task(recipe)
    prompt = make_prompt(prompt_choice(recipe), backbone, task.labels, seed) if given is None else given
    name, train = name or member_name(recipe, seed), recipe.train
    mixture = _mixture(recipe, data)
    module, units = _trained(recipe, backbone, prompt, seed)
    rate = train.lr if train.lr_absolute is None else train.lr_absolute
    ready = data.ready(recipe, prompt.length if prompt is not None else 0)
    rows: Stream
    if mixture is not None and recipe.mixture is not None:
        rows = mixture.stream(backbone, recipe.mixture.rates, recipe.mixture.limit, seed)
    else:
        rows = _stream(task, ready, seed)
    trainee = Trainee(name, module, rows, units, rate, train.match)
    chosen = drawn(task.validation, train.eval_limit)
    dev = Trial(prompt, chosen, task.metrics, decode_options(recipe)) if len(chosen) else None
    return Member(recipe, seed, name, task, prompt, trainee, dev, mixture)


def _mixture(recipe: Recipe, data: Data) -> Mixture | None:
    """The tasks of a recipe's mixture, each with the frame and the words that it is answered by."""
    if recipe.mixture is None:
        return None
    tasks = data.mixed(recipe)
    prompts = [make_prompt(prompt_choice(recipe), data.backbone, task.labels) for task in tasks.values()]
    return Mixture(tasks, prompts, recipe.mixture.prefix)


def _trained(
    recipe: Recipe, backbone: Backbone, prompt: Prompt | None, seed: int
) -> tuple[nn.Module, dict[str, float]]:
    """What is trained, and the learning-rate unit of its parameters by name."""
    train, whole = recipe.train, recipe.train.method != "prompt"
    module: nn.Module
    units: dict[str, float] = {}
    if whole:
        if train.method == "model":
            for parameter in backbone.model.parameters():
                parameter.requires_grad_(True)
        else:
            adapt(backbone.model, train.method, train.rank, seed)
        module = nn.ModuleList([backbone.model, *([prompt] if prompt is not None else [])])
    else:
        if prompt is None:
            raise RecipeError(
                'train.method = "prompt" with prompt.kind = "none" has nothing to train: '
                'choose "input" or "prefix", or train.method = "model"'
            )
        module = prompt
        units = prompt.units() if train.lr_absolute is None else {}
    if isinstance(prompt, Reading) and prompt.trained:  # its rate is absolute, and undoes the trainee's own
        own = "1." if whole else ""
        rate = train.lr if train.lr_absolute is None else train.lr_absolute
        units |= {f"{own}{n}": recipe.prompt.head_lr / rate for n in ("vectors", "bias")}
    return module, units


def _stream(task: Task, ready: Ready, seed: int) -> Stream:
    """The task's training rows, in memory or as they come."""
    if task.spec.streaming:
        return PassStream(lambda turn: task.stream(seed, turn), ready)
    return ExampleStream(task.train, ready, seed=seed)


def keep(
    member: Member,
    outcome: Outcome,
    backbone: Backbone,
    folder: Path,
    seconds: float,
    test: dict[str, float] | None,
) -> Tuned:
    """The main process writes the artifact and the record; `test` are its scores there, where it was read."""
    task, recipe, prompt = member.task, member.recipe, member.prompt
    scores: dict[str, dict[str, float]] = {}
    if outcome.scores:
        scores["validation"] = dict(outcome.scores)
    if test is not None:
        scores["test"] = test
    table = recipe.table() | {"seed": member.seed}
    data = member.data
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
            curve=outcome.curve(),
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
        extra={"steps": outcome.steps, "best_step": outcome.best_step, "best_score": outcome.best_score},
    )
    path = folder / "record.jsonl"
    known = record.find(path, new)  # a run that was killed between its records, and resumed
    row = known or (record.append(path, new) if main else record.row(new))
    return Tuned(member.name, member.seed, place, prompt, scores, outcome, row)
