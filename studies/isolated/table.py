"""records/ -> the table of README.md: python studies/isolated/table.py [--write]"""

import sys
from pathlib import Path
from statistics import mean, stdev

from incipit import record

HERE = Path(__file__).parent
TASKS = ("sst2", "agnews", "trec", "questions")


def scores(name: str) -> list[float]:
    """Accuracy on test in percent, a seed each."""
    rows = record.read(HERE / "records" / f"{name}.jsonl")
    return [100 * row["scores"]["test"]["accuracy"] for row in sorted(rows, key=lambda row: row["seed"])]


def table() -> str:
    """Markdown."""
    lines = ["| task | joint | isolated | difference |", "|---|---|---|---|"]
    for task in TASKS:
        joint, isolated = scores(f"isolated-{task}"), scores(f"isolated-{task}-isolated")
        paired = [b - a for a, b in zip(joint, isolated, strict=True)]
        cells = [f"{mean(each):.1f} ± {stdev(each):.1f}" for each in (joint, isolated)]
        lines.append(f"| {task} | {' | '.join(cells)} | {mean(paired):+.1f} ± {stdev(paired):.1f} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """`text` with the table between its marks."""
    head, rest = text.split("<!-- table -->\n")
    return f"{head}<!-- table -->\n{table()}\n<!-- end -->{rest.split('<!-- end -->')[1]}"


if __name__ == "__main__":
    print(table())
    if "--write" in sys.argv:
        readme = HERE / "README.md"
        readme.write_text(page(readme.read_text(encoding="utf-8")), encoding="utf-8")
