"""Records -> a Markdown table of means and deviations over seeds: python studies/table.py FOLDER/records/*.jsonl"""

import sys
from collections.abc import Sequence
from statistics import mean, stdev

from incipit import record


def rows(paths: Sequence[str], split: str = "test") -> list[list[str]]:
    """Per recipe: name, seeds, mean, deviation and all scores of THE metric in percent, parameters, seconds."""
    found: dict[str, list[dict]] = {}
    for path in paths:
        for row in record.read(path):
            found.setdefault(row["settings"]["name"], []).append(row)
    table = []
    for name, members in found.items():
        scores = [100 * next(iter(m["scores"][split].values())) for m in members]
        spread = f"{stdev(scores):.1f}" if len(scores) > 1 else ""
        each = ", ".join(f"{s:.1f}" for s in scores)
        seconds = mean(m["seconds"] for m in members)
        table.append([name, str(len(members)), f"{mean(scores):.1f}", spread, each,
                      f"{members[0]['parameters']:,}", f"{seconds:.0f}"])  # fmt: skip
    return table


def main(paths: Sequence[str]) -> None:
    """Print the table."""
    head = ["recipe", "seeds", "mean %", "deviation", "each", "trained numbers", "seconds each"]
    for line in [head, ["---"] * len(head), *rows(paths)]:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
