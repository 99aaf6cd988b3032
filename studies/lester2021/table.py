"""Records -> report, figures and the results in README.md: python studies/lester2021/table.py [NEW RECORDS.jsonl ...]

New records are added to records/small.jsonl first. Rows that are there already, or that were made from uncommitted
code, are left out.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from incipit import files, record
from incipit.study import Study, claims, report
from incipit.study.page import Figure, Table, as_markdown

FOLDER = Path(__file__).parent
RECORDS = FOLDER / "records" / "small.jsonl"
OPEN, CLOSE = "<!-- results, written by table.py -->", "<!-- end of results -->"


def add(paths: Sequence[str]) -> int:
    """Append the rows of other record files; how many were new."""
    known = record.read(RECORDS) if files.exists(RECORDS) else []
    seen = {_identity(row) for row in known}
    new = []
    for row in (row for path in paths for row in record.read(path)):
        if not row["provenance"]["dirty"] and _identity(row) not in seen:
            seen.add(_identity(row))
            new.append(row)
    if new:
        lines = [json.dumps(row) for row in [*known, *new]]  # unsorted: the first metric is THE metric
        files.atomic_write(RECORDS, "\n".join(lines) + "\n")
    return len(new)


def _identity(row: dict) -> str:
    return files.sha256_json(
        [row["settings"]["cell"], row["seed"], row["data"], row["backbone"]["fingerprint"]]
    )


def made() -> report.Report:
    """The report of the records."""
    return report.build(Study.read(str(FOLDER), "small"), report.read_records([RECORDS]))


def results(found: report.Report) -> str:
    """What README.md shows of a report: how much was run, the claims that were judged, the figures."""
    rows = record.read(RECORDS)
    hours = sum(float(row["seconds"]) for row in rows) / 3600
    counts = {v: sum(c.verdict == v for c in found.claims) for v in claims.VERDICTS}
    told = ", ".join(f"{count} {report.PLURAL.get(v, v)}" for v, count in counts.items())
    judged = [
        [str(c.number), c.text, c.verdict, c.evidence] for c in found.claims if c.verdict != claims.NOT_RUN
    ]
    shown = [block for block in found.blocks if isinstance(block, Figure)]
    return "\n\n".join(
        [
            f"{found.run} of {found.places} settings are on record: {len(rows)} rows, {hours:.1f} hours of training as "
            f"the clock saw them. Of {len(found.claims)} claims: {told}. Whole: [report.md](report.md), and "
            "[report.html](report.html) as one page.",
            as_markdown([Table(["#", "claim", "verdict", "evidence"], judged)], "").rstrip(),
            *(f"![{figure.says}]({report.FIGURES}/{figure.name}.svg)" for figure in shown),
        ]
    )


def page(text: str, block: str) -> str:
    """README.md with this block in its place."""
    before, _, rest = text.partition(OPEN)
    _, _, after = rest.partition(CLOSE)
    return f"{before}{OPEN}\n\n{block}\n\n{CLOSE}{after}"


def main() -> None:
    """Add, judge, write."""
    print(f"{add(sys.argv[1:])} new records")
    found = made()
    for old in FOLDER.glob(f"{report.FIGURES}/*.svg"):
        old.unlink()
    report.write(found, FOLDER)
    path = FOLDER / "README.md"
    files.atomic_write(path, page(files.read_bytes(path).decode(), results(found)))
    print(f"{found.run} of {found.places} settings: report.html, report.md, figures/, README.md")


if __name__ == "__main__":
    main()
