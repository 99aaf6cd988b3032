"""What verbs print: a table for people, tab-separated lines for a pipe, the same content as a JSON file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under their columns: a rich table on a terminal, else tab-separated lines."""
    texts = [[_text(value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        for line in [list(columns), *texts]:
            typer.echo("\t".join(line))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        numbers = bool(rows) and all(isinstance(row[i], (int, float)) for row in rows)
        shown.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for line in texts:
        shown.add_row(*map(Text, line))  # Text: a piece like [unused1] is no markup
    Console().print(shown)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else one_line(str(value))


def one_line(text: str) -> str:
    """Text with its line breaks and tabs written as \\n, \\r and \\t, so that an answer is one line."""
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def scores(values: Mapping[str, float]) -> str:
    """ "accuracy 0.9000, f1_macro 0.8990" """
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def write(path: Path | None, value: Any) -> None:
    """Write the result as JSON, whole or not at all; nothing when no path is given."""
    if path is not None:
        from incipit import files

        files.write_json(path, value)
