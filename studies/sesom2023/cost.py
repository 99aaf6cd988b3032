"""What an ensemble of K sources costs: python studies/sesom2023/cost.py [--sources 8] [--backbone builtin:minilm]

A process of its own for each way: one prompt, all in one batch, all one after another. Told are seconds of the clock,
the peak of the process's memory beside that of the loaded model, and how far the scores of the last two ways differ.
Run it on a machine that does nothing else.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from incipit import record
from incipit.assemble import PromptChoice, make_prompt
from incipit.backbones import Backbone, load
from incipit.decode import score_all
from incipit.prompts import Prompt
from incipit.tasks.task import builtin

RECORDS = Path(__file__).parent / "records" / "cost.jsonl"
WAYS, ROWS, LENGTH, REPEATS, BATCH = ("one", "together", "apart"), 64, 20, 5, 64
MEGABYTE = 2**20


def peak() -> float:
    """Greatest resident memory of this process so far, in megabytes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (MEGABYTE if sys.platform == "darwin" else 1024)


def made(backbone: Backbone, count: int, words: tuple[str, ...]) -> list[Prompt]:
    """Prompts at different starts: what they say does not matter here."""
    choice = PromptChoice(length=LENGTH, start="vocabulary")
    found = [make_prompt(choice, backbone, words, seed) for seed in range(count)]
    return [prompt for prompt in found if prompt is not None]


def measured(way: str, name: str, sources: int) -> dict[str, object]:
    """One way, in this process."""
    backbone, task = load(name), builtin("reviews", limit=ROWS)
    examples = list(task.train)[:ROWS]
    prompts = made(backbone, 1 if way == "one" else sources, tuple(task.labels))
    score_all(backbone, prompts[:1], examples[:1], batch=1)
    before, seconds, scores = peak(), [], []
    for _ in range(REPEATS):
        started = time.perf_counter()
        if way == "apart":
            scores = [score_all(backbone, [prompt], examples, batch=BATCH)[0] for prompt in prompts]
        else:
            scores = score_all(backbone, prompts, examples, batch=BATCH)
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "loaded": before, "peak": peak(), "scores": scores}


def main() -> None:
    """All ways in turn, then a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--backbone", default="builtin:minilm")
    parser.add_argument("--way", choices=WAYS, help="this way alone, told as JSON")
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measured(given.way, given.backbone, given.sources)))
        return
    started, told = time.monotonic(), {}
    for way in WAYS:
        line = [
            sys.executable,
            __file__,
            "--way",
            way,
            "--backbone",
            given.backbone,
            "--sources",
            str(given.sources),
        ]
        done = subprocess.run(line, check=True, capture_output=True, text=True)
        told[way] = json.loads(done.stdout.splitlines()[-1])
    pairs = zip(told["together"].pop("scores"), told["apart"].pop("scores"), strict=True)
    apart = max(abs(a - b) for one, other in pairs for x, y in zip(one, other, strict=True)
                for a, b in zip(x, y, strict=True))  # fmt: skip
    told["one"].pop("scores")
    ratio = told["together"]["peak"] / told["one"]["peak"]
    backbone = load(given.backbone)
    kept = {"name": backbone.name, "fingerprint": backbone.fingerprint, "parameters": backbone.parameters}
    settings = {"sources": given.sources, "rows": ROWS, "length": LENGTH, "batch": BATCH, "repeats": REPEATS}
    extra = {"ways": told, "difference": apart, "memory": ratio}
    seconds = round(time.monotonic() - started, 2)
    record.append(RECORDS, record.Record("ensemble-cost", 0, {}, settings, {}, kept, seconds, extra=extra))
    for way, one in told.items():
        print(f"{way}: {one['seconds']:.3f} s, peak {one['peak']:.0f} MB, loaded {one['loaded']:.0f} MB")
    print(f"memory together / one: {ratio:.3f}; scores together and apart differ by at most {apart:.1e}")


if __name__ == "__main__":
    main()
