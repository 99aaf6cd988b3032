"""Records -> docs/benchmarks.md and its figures: python -m benchmarks.report

Every number of the page stands in a record; what is written about them stands in notes.toml, by the record's name.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import curves, report_serve
from benchmarks.workload import RECORDS, Plan
from incipit import files

ROOT = Path(__file__).parents[1]
PAGE, FIGURES, NOTES = (
    ROOT / "docs/benchmarks.md",
    ROOT / "docs/figures",
    Path(__file__).parent / "notes.toml",
)
SCRIPTS = ("w1_causal_training", "w2_encoder_decoder", "w3_many_prompts", "w4_decoding", "w5_generate")
LONG = {  # what needs data, and so is not listed by its script
    "w6-accuracy": ("SST-2, builtin:lm, until a given dev accuracy", {"ratio": 8.0}),
    "w7-joint": ("SST-2, builtin:t5, one epoch, joint", {"ratio": 1.3}),
    "w7-isolated": ("SST-2, builtin:t5, one epoch, isolated", {"ratio": 3.0}),
}
Records = Mapping[str, Mapping[str, Any]]

OPENING = """# Benchmarks

How fast incipit is beside PEFT, and how much memory it takes: the same weights, rows and prompt, in one process, in
turn.

<!-- Written by `python -m benchmarks.report` from benchmarks/records; change those, or benchmarks/notes.toml. -->

- **Seconds** are those of a step: medians of at least five turns of each side, which last one step, or as many as a
  second takes, and count with the median of them; **ratio** is PEFT's time over ours.
- **Memory** is the peak that one step adds to what was there before it, in a fresh process for each side; the figure
  is ours over PEFT's. On a CPU our model keeps a second copy of its large float32 weights, in the order of the
  products, and a third where something is trained; they are there before the step, and no part of the figure.
- **Equal** is checked in the same run: loss to 1e-5 and prompt gradient to 1e-4, relative, in float32
  (bfloat16 has 8 bits: 1e-2 and 1e-1); T5 in float32 is rough itself, so both sides are held to PEFT in float64, and
  *rounding* is our distance from it over PEFT's; log-probabilities to 1e-4; of written tokens 98 in 100, for a
  random model has near-ties. A workload that is not equal leaves no record. *Isolated* is another
  function than PEFT's: it is held to its own plain form, the concatenation under a mask.
- **Floor** is the least time that the matrix products can take: 4 x parameters outside embedding and output layer x
  tokens (each prompt once, each text token once), at the fastest rate of a matrix product measured in the same run;
  where nothing is learned 2 x parameters, and the output layer for the rows whose word is asked for.
  *Products alone* are those of the layers at their own sizes, one after another, with nothing between them, over that.
- **PEFT's settings** are those that make it fastest: right-padded batches, no gradient checkpointing, the faster of the
  attentions sdpa and eager (timed before), `no_grad` and `inference_mode` where nothing is learned, its own `generate`
  with cache. Its dropout is off, so that results can be compared.
- Rows are random ids, lengths log-normal with a mean of 27 and a maximum of 58 where nothing else is said; models are
  random, Llama 8 x 512 (V = 32,000) and T5 6 x 512.

```
make bench                          # all workloads, 25 minutes on two cores
python -m benchmarks --only w1,w4   # some of them
python -m benchmarks --device cuda  # W1 to W5 in bfloat16, Llama of 1B and 7B
```
"""


def records(folder: Path = RECORDS) -> dict[str, dict[str, Any]]:
    """Name -> record; toys are no results."""
    names = sorted(n for n in files.folder_files(folder) or [] if n.endswith(".json"))
    found = {name.removesuffix(".json"): files.read_json(folder / name) for name in names}
    return {name: record for name, record in found.items() if not record.get("toy")}


def wanted(kind: str = "cpu") -> dict[str, tuple[str, Mapping[str, float]]]:
    """Name of every workload -> (title, target), in the order of the page."""
    found: dict[str, tuple[str, Mapping[str, float]]] = {}
    for script in SCRIPTS:
        for variant in importlib.import_module(f"benchmarks.{script}").variants(Plan(kind=kind)):
            found[variant.key] = (variant.title, variant.target)
    return found | (LONG if kind == "cpu" else {})


def page(found: Records, notes: Mapping[str, str], serving: Records | None = None) -> str:
    """The whole of docs/benchmarks.md. serving: records of the server."""
    serving = serving or {}
    parts = [OPENING, _table("Workloads", wanted(), found), _said(wanted(), found, notes), _curves(found)]
    parts += [_table("On a GPU", wanted("cuda"), found), _said(wanted("cuda"), found, notes)]
    parts += [report_serve.section(serving, notes), _origin({**found, **serving})]
    return "\n".join(part for part in parts if part)


def _table(title: str, lines: Mapping[str, tuple[str, Mapping[str, float]]], found: Records) -> str:
    there = [name for name in lines if name in found]
    text = [f"## {title}\n"]
    if there:
        text += [
            "| workload | ours | PEFT | ratio | target | memory | floor | equal to | met |",
            "|" + "---|" * 9,
        ]
        text += [_row(name, *lines[name], found[name]) for name in there]
        text.append("")
    missing = [name for name in lines if name not in found]
    if missing:
        text.append(f"Not measured yet: {', '.join(f'`{name}`' for name in missing)}.\n")
    return "\n".join(text)


def _row(name: str, title: str, target: Mapping[str, float], record: Mapping[str, Any]) -> str:
    seconds = record["seconds"]
    memory = f"{record['memory_ratio']:.2f}" if "memory_ratio" in record else ""
    memory += f" (at most {target['memory_ratio']:.2f})" if "memory_ratio" in target else ""
    floor = f"{record['floor_ratio']:.2f}" if "floor_ratio" in record else ""
    floor += f", products alone {record['products_ratio']:.2f}" if "products_ratio" in record else ""
    floor += f" (at most {target['floor_ratio']:.2f})" if "floor_ratio" in target else ""
    floor += f", {record['mfu']:.0%} of the rate" if "cuda" in name and "mfu" in record else ""
    equal = ", ".join(f"{k} {v:.0e}" for k, v in record["difference"].items())
    times = record["ratio"]
    ratio = "not reached" if times is None else f"{times:.2f}x" if times < 2 else f"{times:.1f}x"
    goal = f"{target['ratio']:g}x" if "ratio" in target else ""
    cells = [
        f"`{name}` {record['title']}",
        _time(seconds["ours"]),
        _time(seconds["peft"]),
        f"**{ratio}**",
        goal,
    ]
    return "| " + " | ".join([*cells, memory, floor, equal, met(target, record)]) + " |"


def met(target: Mapping[str, float], record: Mapping[str, Any]) -> str:
    """Whether every target is met: at least the ratio, at most the memory and the floor; "" without one."""
    if not target:
        return ""
    enough = [record["ratio"] is not None and record["ratio"] >= target["ratio"]] if "ratio" in target else []
    enough += [record[k] <= target[k] for k in ("memory_ratio", "floor_ratio") if k in target and k in record]
    return "yes" if all(enough) else "no"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 0.995 else f"{1000 * seconds:.3g} ms"


def _said(lines: Mapping[str, Any], found: Records, notes: Mapping[str, str]) -> str:
    """The notes of what was measured."""
    text = [f"- `{name}`: {notes[name].strip()}" for name in lines if name in notes and name in found]
    return "\n".join([*text, ""]) if text else ""


def _curves(found: Records) -> str:
    text = ["## How cost grows\n"]
    there = [key for key in curves.names() if key in found]
    if there:
        text.append(
            "A smaller Llama (4 x 256, V = 8,000), P = 100, B = 8, mean length 27, where these are not varied; "
            "a turn is one step.\n"
        )
    for key in there:
        says, points = found[key]["says"], found[key]["points"]
        text += [
            f"![{says}](figures/{key}.svg)\n",
            f"| {says} | ours | PEFT | ratio | floor | memory |",
            "|" + "---|" * 6,
        ]
        for p in points:
            text.append(
                f"| {p['value']:,} | {_time(p['seconds']['ours'])} | {_time(p['seconds']['peft'])} | {p['ratio']:.1f}x "
                f"| {_time(p['floor']['seconds'])} | {p['memory_ratio']:.2f} |"
            )
        text.append("")
    missing = [key for key in curves.names() if key not in found]
    if missing:
        text.append(f"Not measured yet: {', '.join(f'`{key}`' for key in missing)}.\n")
    return "\n".join(text)


def _origin(found: Records) -> str:
    """Where the records come from: one line for each run."""
    runs: dict[str, list[str]] = {}
    for name, record in found.items():
        machine, versions = record["machine"], record["versions"]
        where = machine["processor"] if machine["device"] == "cpu" else machine["device"]
        line = (
            f"{where}, {machine['threads']} threads of {machine['cores']} cores, load {record['load']} before, "
            f"{record['date'][:10]}, commit {record['commit'][:10]}{' with changes' if record['dirty'] else ''}; "
            + ", ".join(f"{k} {v}" for k, v in versions.items())
        )
        runs.setdefault(line, []).append(name)
    if not runs:
        return ""
    text = ["## Where the figures come from\n"]
    text += [f"- {', '.join(f'`{n}`' for n in names)}: {line}." for line, names in runs.items()]
    return "\n".join([*text, ""])


# -- figures -------------------------------------------------------------------------------------------------


def draw(key: str, record: Mapping[str, Any], folder: Path) -> None:
    """Time with the floor, and memory, over one axis, as an SVG."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points: Sequence[Mapping[str, Any]] = record["points"]
    values = [p["value"] for p in points]
    with plt.rc_context({"svg.hashsalt": key, "svg.fonttype": "none", "font.size": 9}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
        for side, label, colour in (("peft", "PEFT", "tab:red"), ("ours", "incipit", "tab:blue")):
            left.plot(values, [p["seconds"][side] for p in points], "o-", color=colour, label=label)
            right.plot(
                values, [max(p["memory"][side], 1) / 2**20 for p in points], "o-", color=colour, label=label
            )
        left.plot(values, [p["floor"]["seconds"] for p in points], "k--", label="arithmetic floor")
        for axes, says in ((left, "seconds a step"), (right, "MiB added by a step")):
            axes.set(xscale="log", yscale="log", xlabel=record["says"], ylabel=says)
            axes.grid(alpha=0.3)
        left.legend()
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        plt.close(figure)
    lines = [line.rstrip() for line in stream.getvalue().decode().splitlines()]
    files.atomic_write(folder / f"{key}.svg", "\n".join(lines) + "\n")


def write() -> None:
    """The page and the figures of all curves that are on record."""
    found = records()
    files.atomic_write(PAGE, page(found, files.read_toml(NOTES), records(report_serve.FOLDER)))
    for key in curves.names():
        if key in found:
            draw(key, found[key], FIGURES)


if __name__ == "__main__":
    write()
