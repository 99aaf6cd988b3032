"""TaskSpec: everything that defines a task, in names and numbers; [task] of a recipe, or a task.toml.

    TaskSpec.of({"name": "mood", "kind": "classification", "input": "{text}",
                 "labels": {"0": "negative", "1": "positive"}, "train": "train.jsonl",
                 "split": {"validation": 0.1}})

All problems of a spec are listed at once, each with its key and the nearest valid name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from incipit.errors import DataError, RecipeError, nearest
from incipit.tasks.catalogue import expanded
from incipit.tasks.forms import Form
from incipit.tasks.metrics import DEFAULTS, MEAN, METRICS
from incipit.tasks.reshape import RESHAPES

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class TaskSpec:
    """The definition of a task; paths are relative to the folder that the task is loaded from."""

    name: str
    kind: str
    """classification | multiple_choice | text | span | referent | chat"""
    input: str = ""
    """Template of what the model reads: "Review: {sentence}"; {a.b} reaches into objects, {{ is a brace."""
    description: str = ""
    """For people: what the task asks, and where its data is from."""
    license: str = ""
    """For people: the terms of the data."""
    labels: Mapping[str, str] | Sequence[str] = ()
    """classification: raw value -> label word, or a list of words (raw value: the word, or its index).
    multiple_choice: raw names of the options in order, such as ["A", "B", "C"]; empty: index or option."""
    label: str = "label"
    """Field with the raw label (classification, multiple_choice; referent: whether the phrase is the right one)."""
    target: str = ""
    """Template of what the model must write (text, referent); text: empty takes the first of `answers`."""
    choices: Sequence[str] | str = ()
    """multiple_choice: templates of the options, or the name of one field that holds the list of options."""
    answers: str = "answers"
    """Field with a text, a list or {"text": [...]} (span; text without `target`): all count as right."""
    messages: str = "messages"
    """Field with the turns of a chat: a list of {"role", "content"}, the last by the assistant."""
    metrics: Sequence[str] = ()
    """Names from metrics.METRICS, the first is THE metric; empty: the default of the kind. "mean": of the others."""
    reshape: str = ""
    """Name from reshape.RESHAPES: what a published record becomes before the templates read it."""
    group: str = ""
    """Template of what the examples of one question share (classification), for exact_match_by_group."""
    train: str = ""
    """A file, a folder, FOLDER:STEM of one of its files, or hub:owner/name[/config]:split; empty: no such split."""
    validation: str = ""
    test: str = ""
    split: Mapping[str, float] = field(default_factory=dict)
    """{validation = 0.1, test = 0.1, seed = 0}: shares of train to carve where no source is named. Equal
    inputs, and the examples of one group, stay on one side. Nothing is ever carved from test."""
    shots: int = 0
    """Keep k training examples per class (kinds without classes: k in all); 0: all."""
    shots_seed: int = 0
    """Seed of the choice by `shots` and `limit`."""
    limit: int = 0
    """Keep a seeded choice of at most this many examples of each split, in whole groups; 0: all. Streaming: the
    first ones of validation and test; train is not cut."""
    demonstrations: int = 0
    """Write k worked training examples before each input, class-balanced, never the example itself."""
    demonstrations_seed: int = 0
    streaming: bool = False
    """Read train as it comes, through a shuffle buffer, and never hold it whole."""

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> TaskSpec:
        """From a TOML table, with `form` and `data` or without; raises one RecipeError with all problems."""
        table = expanded(table)
        known = [f.name for f in fields(cls)]
        found = [f"{key}: unknown key{nearest(key, known)}" for key in table if key not in known]
        values = {key: value for key, value in table.items() if key in known and value not in ({}, None)}
        spec = cls(**{"name": "", "kind": ""} | values)
        _refuse(found + spec.problems())
        return spec

    def check(self) -> None:
        """Raise one RecipeError that lists all problems, if there are any."""
        _refuse(self.problems())

    def problems(self) -> list[str]:
        """Every problem as "key: what is wrong; what to do"."""
        typed = list(_wrong_types(self))
        if typed:  # the other rules read the values
            return typed
        return [*_wrong_kind(self), *_wrong_templates(self), *_wrong_labels(self), *_wrong_sources(self)]

    def metric_names(self) -> tuple[str, ...]:
        """The chosen metrics, or the default of the kind."""
        return tuple(self.metrics) or DEFAULTS[self.kind]


_NEEDS = {  # the keys that a kind reads beyond the ones that every kind reads
    "classification": ("input", "labels", "label", "group"),
    "multiple_choice": ("input", "labels", "label", "choices"),
    "text": ("input", "target", "answers"),
    "span": ("input", "answers"),
    "referent": ("input", "target", "label"),
    "chat": ("messages",),
}


def _refuse(found: list[str]) -> None:
    if len(found) == 1:
        raise RecipeError(f"task {found[0]}")
    if found:
        raise RecipeError(f"{len(found)} problems in the task:\n  " + "\n  ".join(found))


def _wrong_types(spec: TaskSpec) -> Iterator[str]:
    def texts(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)

    for f in fields(spec):
        value = getattr(spec, f.name)
        if f.type == "str" and not isinstance(value, str):
            yield f"{f.name}: {value!r} is no text; put it in quotes"
        elif f.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            yield f"{f.name}: {value!r} is no whole number from 0"
        elif f.type == "bool" and not isinstance(value, bool):
            yield f"{f.name}: {value!r}; write true or false"
    if not texts(list(spec.labels.values()) if isinstance(spec.labels, Mapping) else spec.labels):
        yield f"labels: {spec.labels!r}; write a list of words in quotes, or a table raw value = word"
    if not isinstance(spec.choices, str) and not texts(spec.choices):
        yield f"choices: {spec.choices!r}; write a list of templates, or the name of a field"
    if not texts(spec.metrics):
        yield f"metrics: {spec.metrics!r}; write a list of names"
    if not isinstance(spec.split, Mapping):
        yield f"split: {spec.split!r}; write a table: {{validation = 0.1, seed = 0}}"  # type: ignore[unreachable]


def _wrong_kind(spec: TaskSpec) -> Iterator[str]:
    if not spec.name:
        yield "name: missing; give the task a name"
    if spec.kind not in _NEEDS:
        yield f"kind: {spec.kind!r} is unknown{nearest(spec.kind, _NEEDS)}"
        return
    reads = _NEEDS[spec.kind]
    for f in fields(spec):
        some_kind_reads_it = any(f.name in keys for keys in _NEEDS.values())
        value = getattr(spec, f.name)
        if some_kind_reads_it and f.name not in reads and value not in (f.default, [], {}):
            yield f"{f.name}: the kind {spec.kind!r} does not read it; remove it"
    needed = {"input", "choices", *(["target"] if spec.kind == "referent" else [])}
    for key in sorted(set(reads) & needed):
        if not getattr(spec, key):
            yield f"{key}: missing; the kind {spec.kind!r} needs it"
    if MEAN in spec.metrics and len(set(spec.metrics)) < 2:
        yield f"metrics: {MEAN!r} stands alone; name the metrics that it is the mean of beside it"
    if spec.reshape and spec.reshape not in RESHAPES:
        yield f"reshape: {spec.reshape!r} is unknown{nearest(spec.reshape, RESHAPES)}"
    if "exact_match_by_group" in spec.metrics and not spec.group:
        yield 'group: missing; "exact_match_by_group" needs what the examples of one question share'
    for name in spec.metrics:
        if name not in METRICS:
            yield f"metrics: {name!r} is unknown{nearest(name, METRICS)}"
        elif spec.kind not in METRICS[name].kinds:
            fitting = ", ".join(n for n, m in METRICS.items() if spec.kind in m.kinds)
            yield f"metrics: {name!r} does not fit the kind {spec.kind!r}; use {fitting}"
    if spec.kind == "chat" and spec.demonstrations:
        yield "demonstrations: a chat has no single input to put them before; set 0"


def _wrong_templates(spec: TaskSpec) -> Iterator[str]:
    listed = () if isinstance(spec.choices, str) else spec.choices
    for key, text in [
        ("input", spec.input),
        ("target", spec.target),
        ("group", spec.group),
        *(("choices", c) for c in listed),
    ]:
        try:
            Form.parse(text)
        except DataError as error:
            yield f"{key}: {error}"


def _wrong_labels(spec: TaskSpec) -> Iterator[str]:
    if spec.kind == "multiple_choice":
        if isinstance(spec.labels, Mapping):
            yield 'labels: a table; for multiple_choice write the list of raw names, such as ["A", "B"]'
        elif spec.labels and not isinstance(spec.choices, str) and len(spec.labels) != len(spec.choices):
            yield f"labels: {len(spec.labels)} names for {len(spec.choices)} choices; name each choice once"
        if not isinstance(spec.choices, str) and len(spec.choices) == 1:
            yield "choices: one option leaves nothing to choose; write two or more, or name a list field"
        if len(set(spec.labels)) < len(spec.labels):
            yield "labels: a name is there twice; name each choice once"
    if spec.kind != "classification":
        return
    listed = not isinstance(spec.labels, Mapping)
    words = [w.strip() for w in (spec.labels.values() if isinstance(spec.labels, Mapping) else spec.labels)]
    if len(set(words)) < 2:
        yield f"labels: {len(set(words))} label words; a classification needs two or more, raw value = word"
    if "" in words:
        yield "labels: a label word is empty; write a word that the model can say"
    if listed and len(set(words)) < len(words):
        yield "labels: a word is there twice; write each word once, or a table raw value = word"
    if "f1_binary" in spec.metrics and len(set(words)) != 2:
        yield f"metrics: 'f1_binary' needs two label words, not {len(set(words))}; use f1_macro"


def _wrong_sources(spec: TaskSpec) -> Iterator[str]:
    if not any(getattr(spec, name) for name in SPLITS):
        yield "train, validation, test: all missing; name a file, a folder or hub:owner/name:split"
    shares = {key: value for key, value in spec.split.items() if key != "seed"}
    for key, value in spec.split.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key not in ("validation", "test", "seed"):
            yield f"split.{key}: unknown key{nearest(key, ('validation', 'test', 'seed'))}"
        elif key == "seed" and not (number and value == int(value) and value >= 0):
            yield f"split.seed: {value!r} is no whole number from 0"
        elif key != "seed" and not (number and 0 < value < 1):
            yield f"split.{key}: {value!r} is no share between 0 and 1"
        elif key != "seed" and getattr(spec, key):
            yield f"split.{key}: {key} has its own source {getattr(spec, key)!r}; remove one of the two"
    if all(isinstance(v, (int, float)) for v in shares.values()) and sum(shares.values()) >= 1:
        yield f"split: the shares add up to {sum(shares.values()):g}; leave some for train"
    for key in ("shots", "demonstrations", "streaming"):
        if getattr(spec, key) and not spec.train:
            yield f"{key}: there is no train to take them from; name train"
    if shares and not spec.train:
        yield "split: there is no train to carve from; name train"
    if spec.streaming:
        for key in ("split", "shots", "demonstrations"):
            if getattr(spec, key):
                yield f"{key}: needs the whole of train, and streaming never holds it; set streaming = false"
        if (spec.validation or spec.test) and not spec.limit:
            yield "limit: missing; when streaming it says how many validation and test examples to keep"
