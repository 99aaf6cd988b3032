"""Records of `incipit prune` -> Markdown: python studies/xprompt2022/table.py studies/xprompt2022/records/*.jsonl"""

import sys
from collections.abc import Iterator, Sequence
from statistics import mean, stdev

from incipit import record
from incipit.study.paired import flipped, overlap

ROWS = (
    "as it came",
    "masked only",
    "removed only",
    "pruned",
    "restart",
    "random",
    "reversed",
    "shorter",
    "removed",
    "best of 5 plain",
)


def task_of(line: dict) -> str:
    """The task's name."""
    return line["settings"]["task"].get("builtin") or line["settings"]["task"]["name"]


def scores(line: dict, split: str = "test") -> dict[str, float]:
    """Row -> THE metric in percent."""
    return {row["name"]: 100 * next(iter(row[split].values())) for row in line["extra"]["rows"] if row[split]}


def spread(values: Sequence[float]) -> str:
    """ "81.2 ± 1.5" """
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def by_task(lines: Sequence[dict]) -> dict[str, list[dict]]:
    """Task -> its records in order of the seeds."""
    found: dict[str, list[dict]] = {}
    for line in sorted(lines, key=lambda one: one["seed"]):
        found.setdefault(task_of(line), []).append(line)
    return found


def score_table(lines: Sequence[dict]) -> list[list[str]]:
    """A row for each prompt, a column for each task; then the paired difference to the pruned one over all of them."""
    tasks = by_task(lines)
    table = []
    for name in ROWS:
        cells = [spread([scores(line)[name] for line in members]) for members in tasks.values()]
        apart = [scores(line)["pruned"] - scores(line)[name] for line in lines]
        paired = [f"{mean(apart):+.1f}", f"{flipped(apart):.3f}"] if name != "pruned" else ["", ""]
        table.append([name, *cells, *paired])
    return table


def about(lines: Sequence[dict]) -> Iterator[list[str]]:
    """For each task: seeds, kept numbers of each seed, overlap of the better half of the tokens, cost of the search."""
    for task, members in by_task(lines).items():
        kept = [
            f"{100 * m['extra']['pruned']['kept'] / m['extra']['pruned']['numbers']:.0f}" for m in members
        ]
        tables = [m["extra"]["scores"]["tokens"] for m in members]
        same = "{:.2f} ({:.2f})".format(*overlap(tables)) if len(members) > 1 else ""
        stages = ("scores", "tokens", "pieces")
        cost = [sum(m["extra"]["cost"][s]["of_plain"] for s in stages) for m in members]
        yield [task, str(len(members)), ", ".join(kept), same, f"{mean(cost):.2f}"]


def cost_table(lines: Sequence[dict]) -> list[list[str]]:
    """Per record of cost.toml: seconds of one processor, of the scores, the two stages of the search, one training;
    the search in trainings, by the clock (and the machine's load at the end), by these seconds, by passes over rows."""
    table = []
    for line in lines:
        cost = line["extra"]["cost"]
        stages = ("scores", "tokens", "pieces", "retrained")
        seconds, clock = ([cost[s][kind] for s in stages] for kind in ("processor_seconds", "seconds"))
        walled = f"{sum(clock[:3]) / clock[3]:.2f} ({line['provenance']['load']:.1f})"
        passes = sum(cost[s]["of_plain"] for s in ("scores", "tokens", "pieces"))
        table.append([line["name"].removeprefix("cost-"), *(f"{s:.1f}" for s in seconds), walled,
                      f"{sum(seconds[:3]) / seconds[3]:.2f}", f"{passes:.2f}"])  # fmt: skip
    return table


def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    for line in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(line) + " |")


def main(paths: Sequence[str]) -> None:
    """Print the tables."""
    read = [line for path in paths for line in record.read(path)]
    lines = [line for line in read if not line["name"].startswith("cost-")]
    costs = [line for line in read if line["name"].startswith("cost-")]
    show(["processor seconds", "scores", "nine token ratios", "nine piece ratios", "one training",
          "search in trainings by the clock (load)", "search in trainings", "in passes"],
         cost_table(costs))  # fmt: skip
    print()
    show(["test, %", *by_task(lines), "pruned minus it", "p"], score_table(lines))
    print()
    show(["task", "seeds", "numbers kept, %", "overlap of seeds (chance)", "search, in plain trainings"],
         list(about(lines)))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
