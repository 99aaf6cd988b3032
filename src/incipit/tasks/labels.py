"""Labels: raw values of a data file -> label words, matched by their text.

    labels = Labels.of({"0": "negative", "1": "positive"})
    labels.words == ("negative", "positive")
    labels.index(1) == labels.index("1") == labels.index(1.0) == 1

A list of words takes the word itself or its index: Labels.of(["negative", "positive"]).index(0) == 0. Where a
word is itself a number (["1", "2", "3"], ["0.0", "0.5"]) only the words count, because an index would be ambiguous.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from incipit.errors import DataError, nearest
from incipit.tasks.forms import type_name


@dataclass(frozen=True)
class Labels:
    """words: the label words in order. table: raw text -> index of its word."""

    words: tuple[str, ...]
    table: Mapping[str, int]

    @classmethod
    def of(cls, labels: Mapping[str, str] | Sequence[str]) -> Labels:
        """From a mapping raw value -> word (two raw values may share a word), or from a list of words."""
        if isinstance(labels, Mapping):
            words = tuple(dict.fromkeys(labels.values()))
            return cls(words, {str(raw): words.index(word) for raw, word in labels.items()})
        words = tuple(labels)
        table = {word: i for i, word in enumerate(words)}
        if not any(_is_number(word) for word in words):
            table |= {str(i): i for i in range(len(words))}
        return cls(words, table)

    def index(self, raw: Any, field: str = "label") -> int:
        """Index of the word for a raw value; raises DataError for an unknown one (names the nearest)."""
        texts = raw_texts(raw, field)
        for text in texts:
            if text in self.table:
                return self.table[text]
        raise DataError(
            f"field {field!r} holds {raw!r}, which is no label{nearest(texts[0], self.table)}; "
            "mend the record or add it to labels"
        )


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def raw_texts(raw: Any, field: str = "label") -> tuple[str, ...]:
    """The texts under which a raw label may be known: 0 and 0.0 as "0"; true as "True", "true", "1"."""
    if raw is None or (isinstance(raw, float) and math.isnan(raw)):
        what = "null" if raw is None else "NaN"
        raise DataError(f"field {field!r} is {what}; label the record or remove it")
    if isinstance(raw, bool):
        return (str(raw), str(raw).lower(), str(int(raw)))
    if isinstance(raw, float):
        return (str(int(raw)), str(raw)) if raw.is_integer() else (str(raw),)
    if isinstance(raw, int):
        return (str(raw),)
    if not isinstance(raw, str):
        raise DataError(f"field {field!r} is {type_name(raw)}; a label is text, a number, or true or false")
    if not raw.strip():
        raise DataError(f"field {field!r} is empty; label the record or remove it")
    text = raw.strip()
    if text.lower() in ("true", "false"):
        return (raw, text, text.capitalize(), text.lower())
    return (raw, text, text.removesuffix(".0"))  # "0.0" is what a table program makes of 0
