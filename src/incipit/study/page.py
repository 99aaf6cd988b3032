"""Page: headings, texts, tables and figures -> one HTML file with everything inside, and Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ddd; --soft: #666; --good: #186a3b;
  --bad: #b03a2e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --paper: #16181c; --line: #363a41; --soft: #9aa0a8; --good: #6fcf97; --bad: #f08a7c; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.7rem; line-height: 1.25; }
h2 { margin-top: 2.6rem; border-top: 1px solid var(--line); padding-top: 1rem; }
nav { columns: 3 14rem; font-size: 13px; } nav a { display: block; color: inherit; }
table { border-collapse: collapse; margin: 0.6rem 0 1.4rem; font-size: 13px; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: 3px 9px; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid var(--soft); }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; }
.holds, .fails, .unseen { font-weight: 600; white-space: nowrap; }
.holds { color: var(--good); } .fails { color: var(--bad); } .unseen, .idle { color: var(--soft); white-space: nowrap; }
"""
MARKS = {"holds": "holds", "fails": "fails", "not visible here": "unseen", "not run": "idle"}
NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+( ± [\d.]+)?( %)?")


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
    sections = [b.text for b in blocks if isinstance(b, Heading) and b.level == 2]
    links = "".join(f'<a href="#{_anchor(text)}">{html.escape(text)}</a>' for text in sections)
    above = next((n for n, b in enumerate(blocks) if isinstance(b, Heading) and b.level == 2), len(blocks))
    parts = [_html(block) for block in blocks]
    body = "\n".join([*parts[:above], f"<nav>{links}</nav>", *parts[above:]])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _anchor(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def _inline(svg: str) -> str:
    """A figure that takes the page's ink and paper; as a file it keeps black on white."""
    for file, page in (("#000000", "currentColor"), ("#ffffff", "none"), ("#eeeeee", "var(--line)")):
        svg = svg.replace(file, page)
    return svg.replace("<text ", '<text fill="currentColor" ')


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f'<h{level} id="{_anchor(text)}">{html.escape(text)}</h{level}>'
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Table(header, rows):
            top = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            lines = ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows]
            return f"<table><thead><tr>{top}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table>"
        case Figure(_, svg, says):
            return f'<figure role="img" aria-label="{html.escape(says)}">{_inline(svg)}</figure>'


def _cell(text: str) -> str:
    mark = MARKS.get(text) or ("number" if NUMBER.fullmatch(text) else "")
    return f'<td class="{mark}">{html.escape(text)}</td>' if mark else f"<td>{html.escape(text)}</td>"


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
