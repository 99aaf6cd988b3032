"""Records of a study of paired runs -> its records/small.jsonl, report.html, and the tables of its README.

python studies/fill.py xprompt2022 RUNS/*/record.jsonl
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from incipit import files, record
from incipit.study import comparison, report
from incipit.study.page import Heading, Table, Text, as_markdown

STUDIES = Path(__file__).parent
OPEN, CLOSE = "<!-- report -->\n", "<!-- /report -->"


def tables(made: report.Report) -> str:
    """What the README shows: all but the opening, the figures and the provenance; headings one level down."""
    started, kept = False, []
    for block in made.blocks:
        if isinstance(block, Heading) and block.level == 2:
            started = block.text != "Provenance"
            kept += [Heading(3, block.text)] if started else []
        elif started and isinstance(block, Table | Text):
            kept.append(block)
    opening = [block for block in made.blocks[2:4] if isinstance(block, Text)]
    return as_markdown([*opening, *kept], "")


def filled(page: str, made: report.Report) -> str:
    """The page with its tables between the two marks."""
    before, _, rest = page.partition(OPEN)
    return before + OPEN + "\n" + tables(made) + "\n" + CLOSE + rest.partition(CLOSE)[2]


def _key(row: Mapping[str, Any]) -> tuple[str, int, str]:
    return row["name"], row["seed"], row["backbone"]["name"]


def _of_cell(row: Mapping[str, Any]) -> bool:
    """Not of the prompt that a cell began with."""
    return "rows" in row["extra"] or "methods" in row["extra"]


def main(name: str, sources: Sequence[str]) -> None:
    """Take over what is new, then write the pages."""
    folder = STUDIES / name
    kept = folder / "records" / "small.jsonl"
    known = record.read(kept) if files.exists(kept) else []
    have = {_key(row) for row in known}
    for source in sources:
        for row in filter(_of_cell, record.read(source)):
            if row["provenance"]["dirty"]:
                print(f"{source}: {row['name']} came of a working tree that was not committed; left out")
            elif _key(row) not in have:
                files.append_jsonl(kept, row)
                have.add(_key(row))
    made = comparison.build(folder, record.read(kept))
    page = files.read_bytes(folder / "README.md").decode()
    files.atomic_write(folder / "README.md", filled(page, made))
    written, _ = report.write(made, folder / "report")
    print(f"{made.run} of {made.places} cells: {folder / 'README.md'}, {written}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
