"""Records of the servers -> a section of docs/benchmarks.md: beside PEFT (serve.py) and vLLM (serve_vllm.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import serve, serve_vllm
from benchmarks.serve import Load
from benchmarks.workload import Plan

Records = Mapping[str, Mapping[str, Any]]

OPENING = """## Serving

The server on loopback, loaded by a process of its own: in a closed loop for the requests a second, then in an open loop
at half of that for the times. PEFT answers the same requests in one process, without HTTP: "switching" by `set_adapter`
for each request, "by task" in batches of one prompt's requests, which it must know beforehand. vLLM answers behind the
bundle of `incipit export`, in a process of its own, with as many threads as ours. Written tokens are compared.

```
python -m benchmarks.serve          # beside PEFT, a random Llama of 8 x 512
python -m benchmarks.serve_vllm     # beside vLLM, builtin:lm; after make test-vllm
```
"""


def lines() -> dict[str, Load]:
    """Name of every line, in the order of the page."""
    return {load.key: load for load in (*serve.loads(Plan()), *serve_vllm.loads(Plan()))}


def section(found: Records, notes: Mapping[str, str]) -> str:
    """The part of the page."""
    there = {key: load for key, load in lines().items() if key in found}
    text = [OPENING]
    text += _table(
        "beside PEFT", ("switching", "by task"), {k: v for k, v in there.items() if not _vllm(k)}, found
    )
    text += _table("beside vLLM", ("vLLM",), {k: v for k, v in there.items() if _vllm(k)}, found)
    text += [f"- `{key}`: {notes[key].strip()}" for key in there if key in notes]
    missing = [key for key in lines() if key not in found]
    if missing:
        text.append(f"Not measured yet: {', '.join(f'`{key}`' for key in missing)}.\n")
    return "\n".join(text)


def _vllm(key: str) -> bool:
    return key.startswith("serve-vllm-")


def _table(beside: str, peers: Sequence[str], there: Mapping[str, Load], found: Records) -> list[str]:
    if not there:
        return []
    heads = [
        beside,
        "ours",
        *peers,
        "ratio",
        "target",
        "first token p50, p99",
        "between tokens p50, p99",
        "met",
    ]
    rows = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for key, load in there.items():
        record = found[key]
        rates = record["requests_per_second"]
        names = ("ours", "vllm") if _vllm(key) else ("ours", "peft", "per_task")
        opened = record["open"]["ours"] if _vllm(key) else record["open"]
        theirs = record["open"]["vllm"] if _vllm(key) else None
        cells = [f"`{key}` {record['title']}", *(f"{rates[name]:.1f}/s" for name in names)]
        cells += [f"**{record['ratio']:.1f}x**", f"{load.target['ratio']:g}x" if load.target else ""]
        cells += [_times(opened, theirs, name) for name in ("first", "between")]
        met = ("yes" if record["ratio"] >= load.target["ratio"] else "no") if load.target else ""
        rows.append(f"| {' | '.join([*cells, met])} |")
    return [*rows, ""]


def _times(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None, name: str) -> str:
    """p50 and p99 of ours, and of the other where it was loaded too."""
    both = [
        ", ".join(serve.milliseconds(one[name][p]) for p in ("p50", "p99")) for one in (ours, theirs) if one
    ]
    return both[0] if len(both) == 1 else f"{both[0]} (vLLM {both[1]})"
