"""share_m = min(e_m, K) / sum_n min(e_n, K): one model tuned on the rows of several tasks.

Raffel et al. 2020, section 3.5.2 (examples-proportional mixing, e_m examples, artificial limit K). Every task keeps its
words, its metrics and its own dev score; the checkpoint is chosen by the mean of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from incipit.backbones import Backbone
from incipit.batch import Encoded
from incipit.encode import encode
from incipit.errors import DataError
from incipit.evaluation import DecodeOptions, Trial
from incipit.prompts import Prompt
from incipit.run.parts import drawn
from incipit.tasks.example import Example
from incipit.tasks.metrics import METRICS
from incipit.tasks.task import Task
from incipit.train import ExampleStream
from incipit.transfer.multitask import Mixed

MEAN = "mean"  # of the tasks' first metrics: what a mixture's checkpoint is chosen by


def shares(sizes: Sequence[int], rates: str = "proportional", limit: int = 0) -> list[float]:
    """How often each task gives a row. rates: "proportional" (sizes up to `limit`; 0: no limit) or "equal"."""
    if rates == "equal":
        return [1 / len(sizes)] * len(sizes)
    kept = [min(size, limit) if limit else size for size in sizes]
    return [size / sum(kept) for size in kept]


def named(examples: Sequence[Example], name: str) -> list[Example]:
    """The examples with their task's name before the input, as T5 tells its tasks apart."""
    return [replace(example, input=f"{name} {example.input}") for example in examples]


@dataclass(frozen=True)
class Mixture:
    """Tasks by name, each with what an encoder answers it by (elsewhere None)."""

    tasks: Mapping[str, Task]
    prompts: Sequence[Prompt | None]
    prefix: bool

    def examples(self, name: str, split: str) -> Sequence[Example]:
        """One task's split, with its name before every input where the mixture says so."""
        rows = self.tasks[name].examples(split)
        return named(rows, name) if self.prefix else rows

    def stream(self, backbone: Backbone, rates: str, limit: int, seed: int) -> Mixed:
        """Rows of all tasks, drawn by their shares; each knows its task."""
        rows = {name: self.examples(name, "train") for name in self.tasks}
        empty = [name for name, found in rows.items() if not found]
        if empty:
            raise DataError(f"the tasks {empty} of the mixture have no training examples: check their files")

        def ready(room: int) -> Callable[[Example], Encoded]:
            return lambda example: encode(backbone, example, room=room)

        rooms = [prompt.length if prompt is not None else 0 for prompt in self.prompts]
        streams = [
            ExampleStream(found, ready(room), seed) for found, room in zip(rows.values(), rooms, strict=True)
        ]
        return Mixed(streams, shares([len(found) for found in rows.values()], rates, limit), seed)

    def trials(self, split: str, options: DecodeOptions, limit: int = 0) -> dict[str, Trial]:
        """What the mixture is scored on, task by task; a task without that split is left out."""
        found = {}
        for (name, task), prompt in zip(self.tasks.items(), self.prompts, strict=True):
            rows = self.examples(name, split)
            if rows:
                found[name] = Trial(prompt, drawn(rows, limit), task.metrics, options)
        return found


def joined(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Task -> its scores as one table: "mean" of the first metrics, then "trec.accuracy", "trec.legal_rate", ...

    A metric that is better when smaller counts with its sign turned.
    """
    first = [next(iter(found.items())) for found in scores.values()]
    signed = [value if METRICS[metric].higher_is_better else -value for metric, value in first]
    return {MEAN: sum(signed) / len(signed)} | {
        f"{name}.{metric}": value for name, found in scores.items() for metric, value in found.items()
    }
