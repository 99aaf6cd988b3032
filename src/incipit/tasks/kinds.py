"""Kinds: one function a kind turns a record into an Example, or says what is wrong with the record.

    spec = TaskSpec("mood", "classification", input="{text}", labels=["bad", "good"], train="a.jsonl")
    builder(spec)(Record({"text": "Fine.", "label": 1}, "a.jsonl:1"))
    == Example("Fine.", "good", choices=("bad", "good"), choice=1, references=("good",), source="a.jsonl:1")

A builder raises DataError without the place; the reader of the data adds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from incipit.errors import DataError, nearest
from incipit.tasks.example import ROLES, Example, Message
from incipit.tasks.forms import Form, as_text, look_up, type_name
from incipit.tasks.labels import Labels, raw_texts
from incipit.tasks.records import Record
from incipit.tasks.spec import TaskSpec

Build: TypeAlias = Callable[[Record], Example]


def builder(spec: TaskSpec) -> Build:
    """The function record -> Example of a task; templates and labels are parsed here, once."""
    return KINDS[spec.kind](spec)


def _filled(form: Form, record: Record, what: str) -> str:
    text = form.fill(record.fields)
    if not text.strip():
        fields = " and ".join(repr(f) for f in form.fields)
        raise DataError(f"the {what} is empty (field {fields}); write a text there or remove the record")
    return text


def _classification(spec: TaskSpec) -> Build:
    form, labels, group = Form.parse(spec.input), Labels.of(spec.labels), Form.parse(spec.group)

    def build(record: Record) -> Example:
        text = _filled(form, record, "input")
        index = labels.index(look_up(record.fields, spec.label), spec.label)
        word = labels.words[index]
        shared = _filled(group, record, "group") if spec.group else ""
        return Example(text, word, labels.words, index, (word,), source=record.source, group=shared)

    return build


def _multiple_choice(spec: TaskSpec) -> Build:
    form = Form.parse(spec.input)
    field = spec.choices if isinstance(spec.choices, str) else None
    forms = () if isinstance(spec.choices, str) else tuple(Form.parse(c) for c in spec.choices)

    def build(record: Record) -> Example:
        text = _filled(form, record, "input")
        if field is None:
            choices = tuple(_filled(f, record, "option") for f in forms)
        else:
            choices = _texts(look_up(record.fields, field), field)
            if len(choices) < 2:
                raise DataError(f"field {field!r} holds one option; a choice needs two or more")
        index = _option(look_up(record.fields, spec.label), spec.label, tuple(spec.labels), choices)
        return Example(text, choices[index], choices, index, (choices[index],), source=record.source)

    return build


def _option(raw: Any, field: str, names: tuple[str, ...], choices: tuple[str, ...]) -> int:
    """Index of the right option: by name where `names` are given, else by its text or its index from 0."""
    texts = raw_texts(raw, field)
    if names:
        found = {names.index(t) for t in texts if t in names}
        if not found:
            raise DataError(f"field {field!r} holds {raw!r}, which names no option{nearest(texts[0], names)}")
    else:
        found = {choices.index(t) for t in texts if t in choices}
        found |= {int(t) for t in texts if t.isdecimal() and int(t) < len(choices)}
        if not found:
            raise DataError(
                f"field {field!r} holds {raw!r}, neither an option nor an index up to {len(choices) - 1}; "
                'for letters set labels = ["A", "B", ...]'
            )
    if len(found) > 1:
        raise DataError(f"field {field!r} holds {raw!r}, an option's text and another's index; set labels")
    index = found.pop()
    if index >= len(choices):
        raise DataError(
            f"field {field!r} holds {raw!r}, option {index + 1} of {len(choices)}; mend the label"
        )
    return index


def _texts(value: Any, field: str) -> tuple[str, ...]:
    """The texts of a field that holds a text, a list of texts or {"text": [...]}: one or more, none empty."""
    if isinstance(value, Mapping) and "text" in value:
        value, field = value["text"], f"{field}.text"
    if isinstance(value, Mapping) or value is None:
        raise DataError(f'field {field!r} is {type_name(value)}; write a text, a list, or {{"text": [...]}}')
    texts = tuple(as_text(v, f"{field}.{i}") for i, v in enumerate(value)) if isinstance(value, list) else ()
    if not isinstance(value, list):
        texts = (as_text(value, field),)
    if not texts or not all(text.strip() for text in texts):
        what = "an empty text" if texts else "nothing"
        raise DataError(f"field {field!r} holds {what}; fill it or remove the record")
    return texts


def _text(spec: TaskSpec) -> Build:
    if not spec.target:
        return _span(spec)
    form, target = Form.parse(spec.input), Form.parse(spec.target)

    def build(record: Record) -> Example:
        wanted = _filled(target, record, "target")
        return Example(_filled(form, record, "input"), wanted, references=(wanted,), source=record.source)

    return build


def _span(spec: TaskSpec) -> Build:
    form = Form.parse(spec.input)

    def build(record: Record) -> Example:
        answers = _texts(look_up(record.fields, spec.answers), spec.answers)
        text = _filled(form, record, "input")
        return Example(text, answers[0], references=tuple(dict.fromkeys(answers)), source=record.source)

    return build


def _referent(spec: TaskSpec) -> Build:
    form, target, yes = Form.parse(spec.input), Form.parse(spec.target), Labels.of(["False", "True"])

    def build(record: Record) -> Example:
        wanted = _filled(target, record, "target")
        right = yes.index(look_up(record.fields, spec.label), spec.label)
        text = _filled(form, record, "input")
        return Example(text, wanted, (), right, (wanted,), source=record.source)

    return build


def _chat(spec: TaskSpec) -> Build:
    def build(record: Record) -> Example:
        turns = look_up(record.fields, spec.messages)
        if not isinstance(turns, list):
            raise DataError(f"field {spec.messages!r} is {type_name(turns)}, not a list of messages")
        messages = tuple(_message(turn, f"{spec.messages}.{i}") for i, turn in enumerate(turns))
        roles = [message.role for message in messages]
        if roles[-1:] != ["assistant"]:
            last = f"by {roles[-1]!r}" if roles else "missing"
            raise DataError(f"the last turn is {last}; a chat to learn from ends with the assistant")
        if "user" not in roles:
            raise DataError("the chat has no user turn; there is nothing to answer")
        if "system" in roles[1:]:
            place = roles.index("system", 1) + 1
            raise DataError(f"the system turn is number {place}; it can only be the first")
        return Example("", "", messages=messages, source=record.source)

    return build


def _message(turn: Any, field: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f'field {field!r} is {type_name(turn)}; write {{"role": ..., "content": ...}}')
    role, content = (look_up(turn, key) for key in ("role", "content"))
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"field '{field}.role' is {role!r}{nearest(str(role), ROLES)}")
    if not isinstance(content, str) or not content.strip():
        got = "empty" if isinstance(content, str) else type_name(content)
        raise DataError(f"field '{field}.content' is {got}; write the text of the turn")
    return Message(role, content)


KINDS: dict[str, Callable[[TaskSpec], Build]] = {
    "classification": _classification,
    "multiple_choice": _multiple_choice,
    "text": _text,
    "span": _span,
    "referent": _referent,
    "chat": _chat,
}
