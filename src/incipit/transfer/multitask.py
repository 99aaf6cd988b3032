"""Prompts of several tasks trained together around a shared part: one trainee, whose rows name their task.

# T tasks
Training and writing read one and the same Injection, so what was trained is what answers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from incipit import files
from incipit.backbones import Backbone, GenerateOptions
from incipit.batch import Batch, Encoded, collate
from incipit.decode import predict, stacked
from incipit.encode import encode
from incipit.errors import DataError, PromptError
from incipit.prompts import MultitaskPrompt, Prompt
from incipit.tasks.example import Example
from incipit.tasks.metrics import METRICS, compute
from incipit.train import ExampleStream, FitSettings, Outcome, Trainee, fit
from incipit.train.gradients import Objective
from incipit.transfer.distil import LAMBDA, Lesson, distilled

DRAWS = 1024  # tasks that are drawn at a time


@dataclass(frozen=True)
class Row(Encoded):
    """A row that knows its task."""

    task: int = 0


@dataclass(frozen=True)
class Shared:
    """One task of the mixture. prompt: built around the same shared part as the others'. dev: chooses the step, by
    `metric` of answers that are made as `mode`, `options` and `batch` say (see `predict`)."""

    name: str
    prompt: Prompt
    train: Sequence[Example]
    dev: Sequence[Example] = ()
    metric: str = "accuracy"
    mode: str = "auto"
    options: GenerateOptions | None = None
    batch: int = 64


class Mixed:
    """Rows of all tasks, each in its own seeded order: in turn, or drawn by `rates` from the seed; a Stream."""

    def __init__(
        self, streams: Sequence[ExampleStream[Example]], rates: Sequence[float] = (), seed: int = 0
    ) -> None:
        self.streams, self.rates, self.seed, self.position = streams, list(rates), seed, 0
        self._drawn: tuple[int, list[int]] = (-1, [])

    def next(self, count: int) -> list[Encoded]:
        """The next `count` rows."""
        found: list[Encoded] = []
        for _ in range(count):
            k = self._task()
            (row,) = self.streams[k].next(1)
            found.append(Row(**vars(row), task=k))
            self.position += 1
        return found

    def _task(self) -> int:
        """Whose row stands at the present position."""
        if not self.rates:
            return self.position % len(self.streams)
        turn, place = divmod(self.position, DRAWS)
        if self._drawn[0] != turn:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + turn) % 2**63)
            drawn = torch.multinomial(torch.tensor(self.rates), DRAWS, replacement=True, generator=generator)
            self._drawn = turn, drawn.tolist()
        return self._drawn[1][place]

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        return {"position": self.position, "streams": [stream.state() for stream in self.streams]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.position = int(state["position"])
        for stream, own in zip(self.streams, state["streams"], strict=True):
            stream.restore(own)


def fit_shared(
    backbone: Backbone,
    tasks: Sequence[Shared],
    settings: FitSettings,
    folder: files.PathLike,
    *,
    seed: int = 0,
    resume: bool = False,
    teachers: Sequence[Prompt] = (),
    weight: float = LAMBDA,
    hidden: bool = True,
) -> Outcome:
    """Train the prompts of all tasks, the shared part by the gradients of all; they hold the result.

    teachers: a prompt for each task that was tuned on it alone; the students follow them, see `distilled`.

    The dev score is the mean of the tasks' metrics. Save each with `artifact.save`: it bakes to plain rows. A later
    task starts from `sibling` of one of them, and is trained by this same call alone. Raises PromptError where no two
    prompts share a part.
    """
    prompts = [task.prompt for task in tasks]
    if not tasks or len({task.name for task in tasks}) < len(tasks):
        raise DataError(
            "the tasks of a mixture need names of their own: give at least one, and each its name"
        )
    if unread := [t.name for t in tasks if len(t.dev) and t.metric == "perplexity"]:
        raise DataError(
            f"task {unread[0]!r} is scored by perplexity, and a step is chosen by answers: give a metric of text"
        )
    owners = [id(p) for prompt in prompts for p in prompt.parameters()]
    if len(tasks) > 1 and len(set(owners)) == len(owners):
        raise PromptError(
            "no two of these prompts share a part: make the second by `first.sibling()`, or tune them as a bundle"
        )
    module = nn.ModuleList(prompts)
    known = dict(module.named_parameters())  # a shared part under the first name that holds it
    units = {f"{k}.{n}": unit for k, prompt in enumerate(prompts) for n, unit in prompt.units().items()}

    def ready(room: int) -> Callable[[Example], Encoded]:
        return lambda example: encode(backbone, example, room=room)

    streams = [ExampleStream(task.train, ready(task.prompt.length), seed) for task in tasks]
    trainee = Trainee("shared", module, Mixed(streams), {n: u for n, u in units.items() if n in known})

    def joined(encoded: Sequence[Encoded], rows: Sequence[int]) -> Batch:
        return collate(
            encoded, [e.task if isinstance(e, Row) else 0 for e in encoded], pad_id=backbone.pad_id
        )

    def nll(batch: Batch) -> tuple[Tensor, Tensor]:
        used, rows = batch.rows.unique(return_inverse=True)
        injection = stacked([prompts[k] for k in used.tolist()], rows)
        return backbone.loss(replace(batch, rows=rows), injection)

    objective: Objective = nll
    if teachers:
        if len(teachers) != len(tasks):
            raise PromptError(f"{len(teachers)} teachers for {len(tasks)} tasks: give each its own")
        lessons = [Lesson.of(backbone, one, task.train) for one, task in zip(teachers, tasks, strict=True)]
        objective = distilled(nll, backbone, prompts, lessons, weight, hidden)

    def judge(live: Sequence[int]) -> dict[int, dict[str, float]]:
        scores = {}
        for task in tasks:
            if len(task.dev):
                said = predict(
                    backbone, [task.prompt], task.dev, mode=task.mode, options=task.options, batch=task.batch
                )
                found = compute([task.metric], [p.text for p in said], task.dev)[task.metric]
                scores[task.name] = found if METRICS[task.metric].higher_is_better else -found
        if not scores:
            return {}
        return {0: {"mean": sum(scores.values()) / len(scores), **scores}}

    (outcome,) = fit([trainee], objective, settings, folder, joined, evaluate=judge, resume=resume,
                     identity={"tasks": [task.name for task in tasks], "teachers": len(teachers)})  # fmt: skip
    for prompt in prompts:
        prompt.eval()
    return outcome


def next_start(prompts: Sequence[Prompt]) -> Prompt:
    """A prompt for one more task: the shared part of these, and the mean of their own numbers; all of it its own.

    Wang et al. 2023, section 3.2 (target adaptation). Raises PromptError where they share no part.
    """
    made = copy.deepcopy(prompts[0])
    inner, others = shared_within(made), [shared_within(prompt) for prompt in prompts]
    for name, parameter in inner.own.items():
        parameter.data = torch.stack([one.own[name].detach() for one in others]).mean(dim=0)
    return made


def shared_within(prompt: Prompt) -> MultitaskPrompt:
    """The multi-task prompt inside constant text and read-outs."""
    found = next((part for part in prompt.modules() if isinstance(part, MultitaskPrompt)), None)
    if found is None:
        raise PromptError(
            f"a prompt of kind {prompt.kind!r} shares no part with another: make it a MultitaskPrompt"
        )
    return found
