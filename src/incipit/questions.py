"""New inputs: an artifact's text form and a text or a record -> an Example without an answer.

form = {"kind": "classification", "input": "Review: {text}", "words": ["bad", "good"]}
ask(form, "Fine film.") == ask(form, {"text": "Fine film."})
== Example(input="Review: Fine film.", target="", choices=("bad", "good"))
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from incipit import files
from incipit.errors import DataError
from incipit.tasks.example import ROLES, Example, Message
from incipit.tasks.forms import Form, as_text, look_up
from incipit.tasks.records import Problems, data_stem, read
from incipit.tasks.reshape import reshaped

Asked: TypeAlias = str | Mapping[str, Any]


def fields(form: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields of a record that the text form reads."""
    if form["kind"] == "chat":
        return (_messages(form),)
    options = form.get("choices") or ()
    named = (options,) if isinstance(options, str) else [f for o in options for f in Form.parse(o).fields]
    return tuple(dict.fromkeys((*Form.parse(form["input"]).fields, *named)))


def ask(form: Mapping[str, Any], asked: Asked, source: str = "") -> Example:
    """The Example that a prompt of this text form answers. A text fills the only field that the form reads.

    Raises DataError for a record that lacks a field, and for a text where the form reads several fields.
    """
    if form.get("demonstrations"):
        raise DataError(
            f"the prompt was trained with {form['demonstrations']} worked examples before each input, which are not "
            "kept with it: score it by `incipit evaluate`, or train it without demonstrations"
        )
    wanted = fields(form)
    if isinstance(asked, str):
        if len(wanted) != 1:
            listed = ", ".join(map(repr, wanted)) or "none"
            raise DataError(
                f"{source or 'the input'}: a text fills one field, and the prompt's form reads {listed}; "
                "give JSON records with these fields"
            )
        asked = {wanted[0]: [{"role": "user", "content": asked}] if form["kind"] == "chat" else asked}
    try:
        records = list(reshaped(str(form.get("reshape") or ""), asked, "test"))
        if len(records) != 1:
            raise DataError(f"the record asks {len(records)} questions; give one a record")
        return _example(form, records[0], source)
    except DataError as error:
        raise DataError(f"{source}: {error}" if source else str(error)) from error


def _messages(form: Mapping[str, Any]) -> str:
    return str(form.get("messages") or "messages")


def _example(form: Mapping[str, Any], record: Mapping[str, Any], source: str) -> Example:
    if form["kind"] == "chat":
        return Example("", "", messages=_turns(look_up(record, _messages(form))), source=source)
    text = Form.parse(form["input"]).fill(record)
    if not text.strip():
        raise DataError("the input is empty; write a text there or remove the line")
    options = form.get("choices") or ()
    if isinstance(options, str):
        found = look_up(record, options)
        if not isinstance(found, list) or len(found) < 2:
            raise DataError(f"field {options!r} is {found!r}; write a list of two options or more")
        choices = tuple(as_text(option, f"{options}.{i}") for i, option in enumerate(found))
    else:
        choices = tuple(Form.parse(option).fill(record) for option in options)
    return Example(text, "", choices=choices or tuple(form.get("words") or ()), source=source)


def _turns(turns: Any) -> tuple[Message, ...]:
    """The turns of a chat that ends with a question; an empty last turn stands for the answer."""
    if not isinstance(turns, list) or not turns:
        raise DataError('the messages are no list; write [{"role": "user", "content": ...}]')
    for turn in turns:
        known = isinstance(turn, Mapping) and turn.get("role") in ROLES
        if not known or not isinstance(turn.get("content"), str):
            raise DataError(f'{turn!r} is no message; write {{"role": "user", "content": ...}}')
    if turns[-1]["role"] == "assistant":
        raise DataError("the last message is the assistant's; end with what is to be answered")
    return (*(Message(t["role"], t["content"]) for t in turns), Message("assistant", ""))


def read_file(path: str) -> list[tuple[Asked, str]]:
    """What a file asks, each with its place: records of a data file (.jsonl, .csv, ...), else lines."""
    if data_stem(path)[1]:
        problems = Problems()
        found = [(record.fields, record.source) for record in read(path, problems=problems)]
        problems.check()
        return list(found)
    with files.open_data(path) as stream:
        return parse(stream.read(), path)


def parse(data: bytes, name: str) -> list[tuple[Asked, str]]:
    """What a stream asks: JSON records where every line is an object, else its lines; without empty ones.

    Raises DataError for bytes that are no UTF-8, and where all lines look like records and one is broken.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
    numbered = enumerate(text.split("\n"), 1)
    lines = [(line.rstrip("\r"), f"{name}:{i}") for i, line in numbered if line.strip()]
    records = [_record(line) for line, _ in lines]
    if lines and all(record is not None for record in records):
        pairs = zip(records, lines, strict=True)
        return [(record, place) for record, (_, place) in pairs if record is not None]
    if any(record is not None for record in records) and all(line.lstrip()[0] == "{" for line, _ in lines):
        place = lines[records.index(None)][1]
        raise DataError(f"{place}: broken JSON among records; mend the line")
    return list(lines)


def _record(line: str) -> dict[str, Any] | None:
    if not line.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
