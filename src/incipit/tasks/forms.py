"""Text form: a template over field names, filled by plain substitution; no code, no specs, no attributes.

    Form.parse("Review: {text} By {author.name}.").fill({"text": "Fine.", "author": {"name": "Ann"}})
    == "Review: Fine. By Ann."

{{ and }} stand for one brace. {a.b} is the key b inside a, {a.0} the first item of the list a. A field whose
own name holds a dot is found under that name first. What a field holds is never read as a template.
"""

from __future__ import annotations

import datetime
import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from incipit.errors import DataError, nearest

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_SPEC = re.compile(r"[:\[\]]|![rsa]$")  # what str.format would read as a spec, an index or a conversion


@dataclass(frozen=True)
class Form:
    """A parsed template: pieces are (literal text, field that follows it, or None at the end)."""

    text: str
    pieces: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, text: str) -> Form:
        """Parse once; raises DataError for a lone brace, an empty name, or a format spec."""
        pieces: list[tuple[str, str | None]] = []
        literal, end = "", 0
        for match in _PIECE.finditer(text):
            literal += text[end : match.start()]
            end = match.end()
            token = match.group()
            if token in ("{{", "}}"):
                literal += token[0]
            elif match.group(1) is None:
                raise DataError(
                    f"template {text!r}: lone {token!r} at character {match.start() + 1}; "
                    f"write {token * 2!r} for the brace itself, or {{field}} for a field"
                )
            else:
                pieces.append((literal, _field_name(text, match.group(1))))
                literal = ""
        pieces.append((literal + text[end:], None))
        return cls(text, tuple(pieces))

    @property
    def fields(self) -> tuple[str, ...]:
        """Field names in order of first use."""
        return tuple(dict.fromkeys(field for _, field in self.pieces if field is not None))

    def fill(self, record: Mapping[str, Any]) -> str:
        """The text for one record; raises DataError for a missing field (names the nearest) or no text."""
        return "".join(
            literal + ("" if field is None else as_text(look_up(record, field), field))
            for literal, field in self.pieces
        )


def escape(text: str) -> str:
    """Text as a template that yields exactly this text: Form.parse(escape(t)).fill({}) == t."""
    return text.replace("{", "{{").replace("}", "}}")


def _field_name(text: str, name: str) -> str:
    if not name.strip():
        raise DataError(
            f"template {text!r}: {{{name}}} names no field; write {{field}}, or {{{{ }}}} for braces"
        )
    spec = _SPEC.search(name)
    if spec:
        raise DataError(
            f"template {text!r}: {{{name}}} holds {spec.group()!r}, and a template takes field names only; "
            "write {field}, {field.key} or {field.0}"
        )
    return name


def look_up(record: Mapping[str, Any], name: str) -> Any:
    """The value of a plain or dotted field; raises DataError that names the nearest field."""
    if name in record:
        return record[name]
    value: Any = record
    seen = ""
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping):
            raise DataError(f"no field {name!r}{nearest(name, [seen + str(key) for key in value])}")
        elif isinstance(value, list):
            raise DataError(
                f"no field {name!r}: {seen[:-1]!r} is a list of {len(value)}; pick an item, as {seen}0"
            )
        else:
            raise DataError(f"no field {name!r}: {seen[:-1]!r} is {type_name(value)} and holds no fields")
        seen += f"{part}."
    return value


def as_text(value: Any, field: str) -> str:
    """What a template shows for a value: text as it is, numbers and dates by str()."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"field {field!r} is {value}; fill it in or remove the record")
    if isinstance(value, (numbers.Number, datetime.date)):
        return str(value)
    if value is None:
        raise DataError(f"field {field!r} is null; fill it in or remove the record")
    hint = "store it as text"
    if isinstance(value, (list, Mapping)):
        hint = f"pick one part, as {{{field}.{'0' if isinstance(value, list) else 'key'}}}"
    raise DataError(f"field {field!r} is {type_name(value)}, not text; {hint}")


def type_name(value: Any) -> str:
    """A value's type in the words of JSON."""
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
