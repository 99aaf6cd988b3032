"""Task: examples by split, label words and metrics, read lazily from the sources of a TaskSpec.

    task = Task.load(TaskSpec(name="mood", kind="classification", input="{text}", labels=["bad", "good"],
                              train="train.jsonl", split={"validation": 0.1}), base="data/mood")
    task.train[0].target == "good"
    task.metrics == ("accuracy", "f1_macro")

The order of operations: read, carve from train, then shots (train only), then limit, then demonstrations. A
split is read when it is first asked for; a split that does not exist is ().
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from incipit import files
from incipit.errors import DataError, nearest
from incipit.tasks import metrics, splits
from incipit.tasks.example import Example
from incipit.tasks.kinds import builder
from incipit.tasks.labels import Labels
from incipit.tasks.records import Problems, Record, read, split_files
from incipit.tasks.reshape import OTHERWISE_IN_TRAIN, reshaped
from incipit.tasks.spec import SPLITS, TaskSpec

__all__ = ["BUILTIN", "Task", "TaskSpec", "builtin", "builtin_names"]

BUILTIN = Path(__file__).parent / "builtin"
BUFFER = 1000  # examples that the shuffle of a stream holds
_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False)


class Task:
    """Examples, a text form and metrics; knows words and files, no tokens and no models."""

    def __init__(self, spec: TaskSpec, base: files.PathLike | None = None) -> None:
        self.spec = spec
        self.base = base
        self.name, self.kind = spec.name, spec.kind
        self.labels = Labels.of(spec.labels).words if spec.kind == "classification" else ()
        self.metrics = spec.metric_names()
        self._build = builder(spec)
        self._read: dict[str, list[Example]] = {}  # split -> examples as read and carved
        self._ready: dict[str, Sequence[Example]] = {}  # split -> examples as delivered

    @classmethod
    def load(cls, spec: TaskSpec | Mapping[str, Any], base: files.PathLike | None = None) -> Task:
        """Check the spec and build the task; no data is read yet. base: where relative paths start.

        Raises RecipeError with every problem of the spec.
        """
        spec = spec if isinstance(spec, TaskSpec) else TaskSpec.of(spec)
        spec.check()
        return cls(spec, base)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have a source or are carved."""
        return tuple(name for name in SPLITS if getattr(self.spec, name) or name in self.spec.split)

    @property
    def train(self) -> Sequence[Example]:
        """Training examples; raises DataError in a streaming task, whose train has no length."""
        return self.examples("train")

    @property
    def validation(self) -> Sequence[Example]:
        """Examples for choosing a checkpoint."""
        return self.examples("validation")

    @property
    def test(self) -> Sequence[Example]:
        """Examples that are scored once, at the end."""
        return self.examples("test")

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of one split, with demonstrations; () when there is no such split."""
        if split not in SPLITS:
            raise DataError(f"split {split!r} is unknown{nearest(split, SPLITS)}")
        if split == "train" and self.spec.streaming:
            raise DataError(f"task {self.name!r} streams its train: iterate over task.stream(seed, epoch)")
        if split not in self._ready:
            chosen = self._chosen(split)
            if self.spec.demonstrations and chosen:
                k, seed = self.spec.demonstrations, self.spec.demonstrations_seed
                self._ready[split] = splits.Demonstrated(chosen, self._chosen("train"), k, seed, self.labels)
            else:
                self._ready[split] = chosen
        return self._ready[split]

    def stream(self, seed: int, epoch: int = 0, buffer: int = BUFFER) -> Iterator[Example]:
        """One pass over train in an order that (seed, epoch) fixes.

        A task in memory is shuffled whole; a streaming one through a buffer of that many examples, where bad
        data raises at once.
        """
        if not self.spec.streaming:
            return splits.shuffled(self.train, seed, epoch, buffer=max(1, len(self.train)))
        return splits.shuffled(self._source("train", Problems(most=1)), seed, epoch, buffer)

    def check(self) -> dict[str, int]:
        """Read every split that is held in memory: its number of examples; raises DataError for bad data."""
        held = [name for name in self.splits if not (name == "train" and self.spec.streaming)]
        return {name: len(self.examples(name)) for name in held}

    @cached_property
    def data_hash(self) -> str:
        """sha256 over the canonical examples of all splits as delivered; of a stream, over its address."""
        digest = hashlib.sha256()
        for name in self.splits:
            if name == "train" and self.spec.streaming:
                digest.update(f"stream {self.spec.train}\n".encode())
                continue
            digest.update(f"{name}\n".encode())
            for example in self.examples(name):
                line = _CANONICAL.encode(example.canonical())
                digest.update(line.encode("utf-8", errors="surrogatepass") + b"\n")
        return digest.hexdigest()

    def majority(self, split: str = "validation") -> float | None:
        """Score of the task's metric for always giving the commonest answer of train: the floor to beat.

        The commonest label word, or option position; None for kinds without classes, or without such a split.
        """
        rows = self.examples(split)
        if self.kind not in ("classification", "multiple_choice") or not rows or not self.spec.train:
            return None
        train = rows if self.spec.streaming else self._carved("train")  # before shots even the classes out
        counts = Counter(e.choice for e in train if e.choice is not None)
        index = min(counts, key=lambda i: (-counts[i], i))
        texts = [e.choices[min(index, len(e.choices) - 1)] for e in rows]
        return metrics.compute(self.metrics[:1], texts, rows)[self.metrics[0]]

    def _chosen(self, split: str) -> list[Example]:
        """Examples of a split after carving, shots and limit."""
        rows = self._carved(split)
        if split == "train" and self.spec.shots:
            rows = splits.k_shots(rows, self.spec.shots, self.spec.shots_seed, self.labels)
        return splits.subset(rows, self.spec.limit, self.spec.shots_seed) if self.spec.limit else rows

    def _carved(self, split: str) -> list[Example]:
        if split in self._read or split not in self.splits:
            return self._read.get(split, [])
        shares = {name: self.spec.split[name] for name in ("test", "validation") if name in self.spec.split}
        if shares and (split == "train" or split in shares):
            self._read |= self._parted(shares, int(self.spec.split.get("seed", 0)))
        else:
            self._read[split] = self._all(split)
        return self._read[split]

    def _parted(self, shares: Mapping[str, float], seed: int) -> dict[str, list[Example]]:
        """Train and what is carved from it; what is carved is read as a split to judge by is."""
        if self.spec.reshape not in OTHERWISE_IN_TRAIN:
            return splits.carve(self._all("train"), shares, seed)
        sides = splits.carve(self._all("train", read_as="validation"), shares, seed)
        kept = {(e.source, e.input) for e in sides["train"]}
        return sides | {"train": [e for e in self._all("train") if (e.source, e.input) in kept]}

    def _all(self, split: str, read_as: str = "") -> list[Example]:
        """All examples of a source; of a streaming task the first `limit`. Raises DataError where none is left."""
        problems = Problems()
        rows = self._source(split, problems, read_as)
        kept = list(itertools.islice(rows, self.spec.limit) if self.spec.streaming else rows)
        problems.check()
        if not kept:
            raise DataError(
                f"{getattr(self.spec, split)!r}: the reshape {self.spec.reshape!r} leaves no example for the split "
                f"{split!r}; name data that it is meant for"
            )
        return kept

    def _source(self, split: str, problems: Problems, read_as: str = "") -> Iterator[Example]:
        source: str = getattr(self.spec, split)
        records = read(source, problems=problems, base=self.base, split=split, streaming=self.spec.streaming)
        for record in records:
            try:
                examples = [
                    self._build(Record(fields, record.source))
                    for fields in reshaped(self.spec.reshape, record.fields, read_as or split)
                ]
            except DataError as error:
                problems.add(record.source, str(error))
            else:
                yield from examples


def builtin_names() -> tuple[str, ...]:
    """Names of the tasks that come with the package."""
    return tuple(sorted(Path(folder).name for folder in files.list_folders(BUILTIN, "task.toml")))


def builtin(name: str, /, *, base: files.PathLike = "", **changes: Any) -> Task:
    """A task that comes with the package; changes replace keys of its spec, as in builtin("mood", shots=8).

    The splits are the files train.*, validation.*, test.* of its folder, where its task.toml names no others.
    base: the folder that a relative path among the changes starts from; without it, where the process runs.
    """
    if name not in builtin_names():
        raise DataError(f"no built-in task {name!r}{nearest(name, builtin_names())}")
    folder = BUILTIN / name
    spec = TaskSpec.of(_found_splits(folder) | files.read_toml(folder / "task.toml"))
    known = TaskSpec.__dataclass_fields__
    for key in changes:
        if key not in known:
            raise DataError(f"a task has no key {key!r}{nearest(key, known)}")
    for split in SPLITS:
        source = changes.get(split)
        if source and not source.startswith("hub:") and not files.is_remote(source):
            changes[split] = str(Path(base).absolute() / source)
    return Task.load(replace(spec, **changes), base=folder)


def _found_splits(folder: Path) -> dict[str, str]:
    names = files.folder_files(folder) or []
    return {split: found[0] for split in SPLITS if (found := split_files(names, split))}
