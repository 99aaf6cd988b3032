"""Page: headings, texts, tables and figures -> one HTML file with everything inside, and Markdown."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 0.6rem 0 1.4rem; font-size: 13px; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 3px 9px; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; }
svg { max-width: 100%; height: auto; }
.holds { color: #186a3b; font-weight: 600; } .fails { color: #b03a2e; font-weight: 600; }
"""


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 or below."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells are plain text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """svg: the text of an <svg> element. name: of its file beside the Markdown. says: what it shows."""

    name: str
    svg: str
    says: str


Block: TypeAlias = Heading | Text | Table | Figure


def as_html(blocks: Sequence[Block]) -> str:
    """A page that needs no other file and no network."""
    title = next((b.text for b in blocks if isinstance(b, Heading)), "report")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(_html(block) for block in blocks)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Table(header, rows):
            top = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            lines = ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows]
            return f"<table><thead><tr>{top}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table>"
        case Figure(_, svg, says):
            return f'<figure role="img" aria-label="{html.escape(says)}">{svg}</figure>'


def _cell(text: str) -> str:
    mark = f' class="{text}"' if text in ("holds", "fails") else ""
    return f"<td{mark}>{html.escape(text)}</td>"


def as_markdown(blocks: Sequence[Block], figures: str) -> str:
    """The same; figures are files NAME.svg in the folder `figures`."""
    return "\n\n".join(_markdown(block, figures) for block in blocks) + "\n"


def _markdown(block: Block, figures: str) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join(
                "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
            )
        case Figure(name, _, says):
            return f"![{says}]({figures}/{name}.svg)"
