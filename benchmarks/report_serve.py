"""Records of the server -> a section of docs/benchmarks.md: beside PEFT, beside vLLM, under load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import serve_vllm
from benchmarks.serve import Load, loads
from benchmarks.workload import RECORDS, Plan

FOLDER = RECORDS / "serve"
Record = Mapping[str, Any]

OPENING = """## Serving

`incipit serve` over HTTP on this machine, 16 new tokens a request. Beside PEFT: random Llama 8 x 512, prompts of 100
rows, the driver in a process of its own; throughput in a closed loop, times in an open loop (random arrivals) at half
of it. PEFT answers the same requests in process, without HTTP: one after another with `set_adapter` for each, and by
task, all requests of one prompt together, which it must know beforehand.
"""
VLLM = """
Beside vLLM: `builtin:lm`, prompts of 100 rows. vLLM answers behind the bundle of `incipit export`, in a process of its
own with as many threads; the times are those of an open loop at half of our throughput. Written tokens are compared.

| clients, prompts | requests/s | vLLM | ratio | first token p50, p99 | vLLM | between tokens p50, p99 | vLLM |
|---|---|---|---|---|---|---|---|"""
UNDER = """
Under load: `builtin:lm`, 16 prompts of 20 rows, a server process that is asked by another one (`make soak`).

| part | promised | found | kept |
|---|---|---|---|"""
AGAIN = """
```
python -m benchmarks.serve        # beside PEFT
python -m benchmarks.serve_vllm   # beside vLLM; after make test-vllm
make soak                         # under load; SOAK="--only overload,killed" for some parts
```
"""


def ms(seconds: float | None) -> str:
    """Milliseconds, or a dash."""
    return "-" if seconds is None else f"{1000 * seconds:.0f} ms"


def _soak(r: Record) -> str:
    return (
        f"{r['requests']:,} requests in {r['seconds']:.0f} s: {r['megabytes_per_10000']:.2f} MB per 10,000, "
        f"descriptors {r['descriptors'][0]} to {r['descriptors'][1]}, tasks {r['tasks'][0]} to {r['tasks'][1]}"
    )


def _overload(r: Record) -> str:
    statuses = ", ".join(f"{n} times {s}" for s, n in r["statuses"].items())
    return (
        f"{r['rate']:.0f} requests/s on {r['capacity']:.0f} for {r['seconds']:.0f} s: {statuses}; refusals p50 "
        f"{ms(r['refused_p50'])}, p99 {ms(r['refused_p99'])}; {r['late']} answers late; memory within "
        f"{r['memory_spread']:.1%}"
    )


def _killed(r: Record) -> str:
    return "; ".join(
        f"{name}: errors after {r[name]['told']:.1f} s, back after {r[name]['back']:.1f} s"
        for name in ("killed", "stuck", "engine killed", "engine stuck")
        if name in r
    )


# part -> (what is promised, what a record says)
PARTS: Mapping[str, tuple[str, Callable[[Record], str]]] = {
    "batching": (
        "16 clients at least 4 times one; 16 prompts within 5 % of one",
        lambda r: (
            f"{r['batching']:.1f} times ({r['rates']['16 clients, 16 prompts']:.0f} requests/s); {r['mixing']:.3f}"
        ),
    ),
    "overload": (
        "at 3 times capacity only 200, 429, 503; refusals within 50 ms (p99), answers within their deadline, memory "
        "within 5 %",
        _overload,
    ),
    "fairness": (
        "one task with 90 % of the load: p95 of the others at most twice their quiet p95",
        lambda r: f"{ms(r['beside_p95'])} beside it, {ms(r['quiet_p95'])} alone: {r['ratio']:.2f}",
    ),
    "aborts": (
        "nothing is left of those who go away",
        lambda r: f"{r['left']:,} of {r['aborts']:,} went away: slots, queues, descriptors, tasks as before",
    ),
    "swap": (
        "an alias moves under load: each answer of one version, none fails",
        lambda r: f"{r['swaps']} moves, {sum(r['answers'].values()):,} answers",
    ),
    "terminate": (
        "SIGTERM: not ready within 100 ms, running requests finish, new ones 503, exit status 0",
        lambda r: f"{ms(r['unready'])}, {r['finished']} finished, {r['new']}, {r['exit']}",
    ),
    "killed": ("killed or stuck: errors within 2 s, not ready at once, back by itself", _killed),
    "soak": ("no growth of slots, tasks, descriptors; under 2 MB per 10,000 requests", _soak),
}


def lines() -> dict[str, Load]:
    """Name -> line of both tables of loads, in the order of the page."""
    return {load.key: load for load in (*loads(Plan()), *serve_vllm.loads(Plan()))}


def section(found: Mapping[str, Record], notes: Mapping[str, str]) -> str:
    """The section; without records it says what is to be measured."""
    beside = {name: r for name, r in found.items() if name.startswith("serve-") and "per_task_ratio" in r}
    vllm = [r for name, r in found.items() if name.startswith("serve-vllm-")]
    under = {part: found[f"soak-{part}"] for part in PARTS if f"soak-{part}" in found}
    text = [OPENING]
    if beside:
        text += [
            "| clients, prompts | requests/s | PEFT switching | ratio | PEFT by task | ratio | first token p50, p99 | "
            "between tokens p50, p99 |",
            "|" + "---|" * 8,
        ]
        text += [_line(r) for r in sorted(beside.values(), key=_size)]
    if vllm:
        text += [VLLM, *(_vllm(r) for r in sorted(vllm, key=_size))]
    if under:
        text.append(UNDER)
        for part, record in under.items():
            promised, says = PARTS[part]
            broken = "; ".join(record["broken"])
            text.append(f"| {part} | {promised} | {says(record)} | {'no: ' + broken if broken else 'yes'} |")
    text += ["", *(f"- `{key}`: {notes[key].strip()}" for key in lines() if key in found and key in notes)]
    missing = [f"`{key}`" for key in lines() if key not in found]
    text += [f"Not measured yet: {', '.join(missing)}."] if missing else []
    return "\n".join([*text, AGAIN])


def _size(r: Record) -> tuple[int, int]:
    return r["settings"]["clients"], r["settings"]["prompts"]


def _vllm(r: Record) -> str:
    rate, goal = r["requests_per_second"], f" (target {r['target']['ratio']:g}x)" if r["target"] else ""
    cells = [
        f"{r['settings']['clients']}, {r['settings']['prompts']:,}",
        f"{rate['ours']:.1f}",
        f"{rate['vllm']:.1f}",
        f"**{r['ratio']:.1f}x**{goal}",
    ]
    for name in ("first", "between"):
        cells += [
            ", ".join(ms(r["open"][side][name][p]) for p in ("p50", "p99")) for side in ("ours", "vllm")
        ]
    return "| " + " | ".join(cells) + " |"


def _line(r: Record) -> str:
    rate, first, between = r["requests_per_second"], r["open"]["first"], r["open"]["between"]
    goal = f" (target {r['target']['ratio']:g}x)" if "ratio" in r["target"] else ""
    cells = [
        f"{r['settings']['clients']}, {r['settings']['prompts']:,}",
        f"{rate['ours']:.1f}",
        f"{rate['peft']:.1f}",
        f"**{r['ratio']:.1f}x**{goal}",
        f"{rate['per_task']:.1f}",
        f"{r['per_task_ratio']:.1f}x",
        f"{ms(first['p50'])}, {ms(first['p99'])}",
        f"{ms(between['p50'])}, {ms(between['p99'])}",
    ]
    return "| " + " | ".join(cells) + " |"
