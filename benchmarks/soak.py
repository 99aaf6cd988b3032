"""What must hold under load, over HTTP: python -m benchmarks.soak [--only overload,aborts] [--requests 100000]

`incipit serve` runs as a process of its own; this one asks. Each part leaves a record and says what it found; the exit
status is 1 where a promise is not kept. Parts: batching, overload, fairness, aborts, swap, terminate, killed, soak. 16
new tokens, builtin:lm, 16 prompts of 20 rows.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import machine
from benchmarks.load import LEFT, Reply, closed, opened
from benchmarks.soak_asker import PROMPTS, Asker, Job, Sizes
from benchmarks.soak_server import counted, library, percentile, served, slope
from benchmarks.workload import RECORDS
from incipit import files
from incipit.backbones import load
from incipit.serve.http.server import widen

MIB = 2**20
OPEN, TASKS = "process_open_fds", "incipit:http_tasks"
MEMORY = (
    "process_resident_memory_bytes",
    "incipit_engine_process_resident_memory_bytes",
)  # HTTP's, the engine's
Found = dict[str, Any]


@contextmanager
def unhalted() -> Iterator[None]:
    """What this process does beside asking would count as waiting: looking for garbage among all that there is."""
    before = gc.get_threshold()
    widen()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


async def capacity(ask: Asker, seconds: float = 15.0) -> float:
    """Requests a second that are answered when 64 clients ask all the time."""
    jobs = [ask.write(f"p{i % PROMPTS}") for i in range(20_000)]
    await closed(jobs[:128], 64, seconds)
    begun = time.perf_counter()
    replies = await closed(jobs[128:], 64, seconds)
    return len([r for r in replies if r.status == 200]) / (time.perf_counter() - begun)


# -- the parts: what was found, and what of it breaks a promise --------------------------------------------------


async def soak(ask: Asker) -> Found:
    """Many requests of all kinds: nothing grows."""
    count, points = ask.sizes.requests, list[dict[str, float]]()
    begun, statuses = time.perf_counter(), dict[int, int]()
    for part in range(20):
        jobs = [ask.any(i) for i in range(count // 20)]
        for reply in await closed(jobs, 64, 3600.0):
            statuses[reply.status] = statuses.get(reply.status, 0) + 1
        points.append(await ask.server.rest() | {"requests": (part + 1) * count // 20})
    second = points[len(points) // 4 :]  # what is set up once is set up by then
    growth = slope([(p["requests"], sum(p[name] for name in MEMORY)) for p in second]) * 10_000 / MIB
    ends = {name: [int(p[name]) for p in (points[0], points[-1])] for name in (OPEN, TASKS)}
    strange = {s: n for s, n in statuses.items() if s not in (200, 400, 404, LEFT)}
    return {
        "seconds": time.perf_counter() - begun,
        "requests": count,
        "statuses": {str(s): n for s, n in sorted(statuses.items())},
        "megabytes_per_10000": growth,
        "memory": {name: [p[name] for p in points] for name in MEMORY},
        "descriptors": ends[OPEN],
        "tasks": ends[TASKS],
        "broken": [
            *([f"memory grows by {growth:.2f} MB per 10,000 requests"] if growth >= 2.0 else []),
            *(f"{name} grew from {a} to {b}" for name, (a, b) in ends.items() if b > a),
            *([f"statuses {strange}"] if strange else []),
        ],
    }


async def overload(ask: Asker) -> Found:
    """Three times what it can do."""
    able = await capacity(ask, min(15.0, ask.sizes.seconds))
    rate, seconds = 3 * able, ask.sizes.seconds
    allowed = (1.5, 3.0, 6.0, 12.0)  # seconds that requests leave
    jobs, bounds = list[Callable[[], Awaitable[tuple[float, Reply]]]](), allowed * int(rate * seconds)

    def bounded(bound: float, job: Job) -> Callable[[], Awaitable[tuple[float, Reply]]]:
        async def run() -> tuple[float, Reply]:
            return bound, await job()

        return run

    jobs = [bounded(b, ask.write(f"p{i % PROMPTS}", timeout=b)) for i, b in enumerate(bounds)]
    memory, over = list[dict[str, float]](), asyncio.Event()

    async def watch() -> None:
        while not over.is_set():
            memory.append(await ask.server.figures())
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), max(0.2, seconds / 30))

    watching = asyncio.ensure_future(watch())
    replies = await opened(jobs, rate, seconds)
    over.set()
    await watching
    await ask.server.rest()
    late = [r.seconds - bound for bound, r in replies if r.status == 200 and r.seconds > bound + 0.1]
    refused = percentile([r.seconds for _, r in replies if r.status in (429, 503)], 99)
    half = memory[len(memory) // 4 :]
    sizes = [[found[name] for found in half] for name in MEMORY]
    flat = max((max(size) - min(size)) / min(size) for size in sizes)
    strange = counted([r.status for _, r in replies if r.status not in (200, 429, 503)])
    return {
        "capacity": able,
        "rate": rate,
        "seconds": seconds,
        "statuses": counted([r.status for _, r in replies]),
        "answered_per_second": len([r for _, r in replies if r.status == 200]) / seconds,
        "refused_p50": percentile([r.seconds for _, r in replies if r.status in (429, 503)], 50),
        "refused_p99": refused,
        "late": len(late),
        "memory_spread": flat,
        "broken": [
            *([f"statuses {strange}"] if strange else []),
            *([f"refusals take {1000 * refused:.0f} ms (p99)"] if refused > 0.05 else []),
            *([f"{len(late)} answers after their deadline, by {max(late):.2f} s at most"] if late else []),
            *([f"memory varies by {flat:.1%}"] if flat > 0.05 else []),
        ],
    }


async def batching(ask: Asker) -> Found:
    """What batching gives, and what mixing costs; to and fro, so that neighbours on the machine harm all alike."""
    wanted, rates = ((1, 1), (16, 1), (16, PROMPTS)), dict[tuple[int, int], list[float]]()
    for turn in range(ask.sizes.turns + 1):  # the first warms up
        for clients, prompts in wanted if turn % 2 else wanted[::-1]:
            count = 16 if clients == 1 else 160
            jobs = [ask.write(f"p{i % prompts}") for i in range(count)]
            begun = time.perf_counter()
            await closed(jobs, clients, 60.0)
            if turn:
                rates.setdefault((clients, prompts), []).append(count / (time.perf_counter() - begun))
    one, same, mixed = (median(rates[w]) for w in wanted)
    mixing = median(b / a for a, b in zip(rates[wanted[1]], rates[wanted[2]], strict=True))  # turn by turn
    return {
        "rates": {
            "1 client, 1 prompt": one,
            "16 clients, 1 prompt": same,
            f"16 clients, {PROMPTS} prompts": mixed,
        },
        "batching": mixed / one,
        "mixing": mixing,
        "broken": [
            *([f"16 clients get {mixed / one:.1f} times the answers of one"] if mixed < 4 * one else []),
            *([f"{PROMPTS} prompts get {mixing:.3f} of one's answers"] if mixing < 0.95 else []),
        ],
    }


async def fairness(ask: Asker) -> Found:
    """One task sends nine tenths of what the server can do; the others beside it, and alone."""
    able, seconds = await capacity(ask, min(15.0, ask.sizes.seconds)), ask.sizes.seconds
    light, heavy = 0.1 * able, 0.9 * able

    def quiet() -> list[Job]:
        return [ask.write(f"p{1 + i % (PROMPTS - 1)}") for i in range(int(2 * light * seconds) + 20)]

    alone = await opened(quiet(), light, seconds, seed=1)
    flood = [ask.write("p0") for _ in range(int(2 * heavy * seconds) + 20)]
    beside, _ = await asyncio.gather(
        opened(quiet(), light, seconds, seed=1), opened(flood, heavy, seconds, seed=2)
    )
    p95 = [percentile([r.seconds for r in half if r.status == 200], 95) for half in (alone, beside)]
    lost = counted([r.status for r in (*alone, *beside) if r.status != 200])
    return {
        "capacity": able,
        "seconds": seconds,
        "quiet_p95": p95[0],
        "beside_p95": p95[1],
        "ratio": p95[1] / p95[0],
        "others": len(beside),
        "broken": [
            *(
                [f"p95 of the others is {p95[1] / p95[0]:.2f} times their quiet p95"]
                if p95[1] > 2 * p95[0]
                else []
            ),
            *([f"others were not served: {lost}"] if lost else []),
        ],
    }


async def aborts(ask: Asker) -> Found:
    """Clients go away at random moments: nothing stays behind."""
    count = ask.sizes.aborts
    await closed([ask.write(f"p{i % PROMPTS}") for i in range(64)], 64, 60.0)
    before = await ask.server.rest()
    jobs = [
        ask.write(f"p{i % PROMPTS}", stream=bool(i % 2), leave=ask.source.random() ** 2) for i in range(count)
    ]
    replies = await closed(jobs, 64, 3600.0)
    after = await ask.server.rest()  # slots, queues and reserved positions are 0 again, or it raises
    again = await closed([ask.write(f"p{i % PROMPTS}") for i in range(64)], 64, 60.0)
    grown = {name: (before[name], after[name]) for name in (OPEN, TASKS) if after[name] > before[name]}
    return {
        "aborts": count,
        "left": len([r for r in replies if r.status == LEFT]),
        "statuses": counted([r.status for r in replies]),
        "broken": [
            *(f"{name} grew from {a:.0f} to {b:.0f}" for name, (a, b) in grown.items()),
            *(["requests afterwards fail"] if any(r.status != 200 for r in again) else []),
        ],
    }


async def terminate(ask: Asker) -> Found:
    """SIGTERM under load."""
    taken = [
        asyncio.ensure_future(ask.write(f"p{i % PROMPTS}", stream=True, max_tokens=96)()) for i in range(24)
    ]
    await ask.server.runs(20)
    ask.server.process.send_signal(signal.SIGTERM)
    begun = time.perf_counter()
    while await ask.server.ready():
        await asyncio.sleep(0.005)
    unready = time.perf_counter() - begun
    new = await ask.write("p0")()
    finished = await asyncio.gather(*taken)
    code = await asyncio.to_thread(ask.server.process.wait, 60)
    wrong = counted([r.status for r in finished if r.status != 200 or b'"error"' in r.body])
    return {
        "unready": unready,
        "new": new.status,
        "finished": len(finished),
        "exit": code,
        "broken": [
            *([f"ready for {1000 * unready:.0f} ms more"] if unready > 0.1 else []),
            *([f"a new request got {new.status}"] if new.status != 503 else []),
            *([f"running requests ended so: {wrong}"] if wrong else []),
            *([f"exit status {code}"] if code else []),
        ],
    }


async def swap(ask: Asker) -> Found:
    """An alias moves to and fro under load: each answer is wholly of one version."""
    body = {"prompt": ask.ids[:12], "max_tokens": 32, "ignore_eos": True, "logprobs": 0}

    def logs(said: Any) -> list[float]:
        return list(said["choices"][0]["logprobs"]["token_logprobs"])

    def apart(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) for x, y in zip(a, b, strict=True))

    alone = {}
    for name in ("p0", "p1"):
        said = (await ask.server.ask("/v1/completions", {"model": name} | body)).json()
        alone[said["system_fingerprint"]] = logs(said)
    over, replies = asyncio.Event(), list[Reply]()

    async def client() -> None:
        while not over.is_set():
            replies.append(await ask.server.ask("/v1/completions", {"model": "now"} | body))

    async def point(name: str) -> int:
        return (await ask.server.ask("/v1/aliases/now", {"target": name}, key=ask.server.key)).status

    moved = [await point("p0")]
    clients = [asyncio.ensure_future(client()) for _ in range(16)]
    for i in range(ask.sizes.swaps):
        moved.append(await point(f"p{(i + 1) % 2}"))
    over.set()
    await asyncio.gather(*clients)
    told = [r.json() for r in replies if r.status == 200]
    mixed = [t for t in told if apart(logs(t), alone[t["system_fingerprint"]]) > 1e-3]
    shown = apart(*alone.values())
    seen = counted([t["system_fingerprint"] for t in told])
    return {
        "swaps": ask.sizes.swaps,
        "answers": seen,
        "broken": [
            *([f"{len(mixed)} answers are of no version"] if mixed else []),
            *([f"{len(replies) - len(told)} requests failed"] if len(told) < len(replies) else []),
            *([f"moving the alias: {counted(moved)}"] if set(moved) != {200} else []),
            *([f"the versions differ by {shown} only: nothing is shown"] if shown < 1e-1 else []),
        ],
    }


async def killed(ask: Asker) -> Found:
    """The process that serves and the one that computes are killed under load, then halted, as code does that hangs."""
    found: Found = {"broken": []}
    broken: list[str] = found["broken"]
    ways = [("killed", signal.SIGKILL), ("stuck", signal.SIGSTOP)]
    ways += [(f"engine {name}", harm) for name, harm in ways]
    for count, (name, harm) in enumerate(ways, 1):
        taken = [
            asyncio.ensure_future(ask.write(f"p{i % PROMPTS}", stream=True, max_tokens=96)())
            for i in range(24)
        ]
        await ask.server.runs(20)
        os.kill(ask.server.engine if count > 2 else ask.server.worker, harm)
        begun = time.perf_counter()
        falls = asyncio.ensure_future(ask.server.down())
        replies = await asyncio.gather(*taken)
        told = time.perf_counter() - begun
        unready = await falls
        back = time.perf_counter() - begun + await ask.server.up()
        after = await ask.write("p0")()
        restarts = (await ask.server.figures())["incipit:engine_restarts_total"]
        found[name] = {"told": told, "unready": unready, "back": back, "after": after.status}
        broken += [
            *([f"{name}: clients wait {told:.2f} s for their error"] if told > 2.0 else []),
            *([f"{name}: a request was answered, the harm came too late"] if any(
                r.status == 200 and b'"error"' not in r.body for r in replies) else []),
            *([f"{name}: ready for {unready:.2f} s more"] if unready > 2.0 else []),
            *([f"{name}: afterwards {after.status}"] if after.status != 200 else []),
            *([f"{name}: {restarts:.0f} restarts are told"] if restarts != count else []),
        ]  # fmt: skip
    return found


PARTS: Mapping[str, Callable[[Asker], Coroutine[Any, Any, Found]]] = {
    "batching": batching,
    "overload": overload,
    "fairness": fairness,
    "aborts": aborts,
    "swap": swap,
    "terminate": terminate,
    "killed": killed,
    "soak": soak,
}


def run(names: Sequence[str], sizes: Sizes, out: str, origin: Mapping[str, Any], name: str) -> list[str]:
    """Each part with a server of its own; writes records, returns what is broken."""
    backbone, broken = load(name, device="cpu"), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        library(Path(folder), backbone, PROMPTS)
        for part in names:
            with served(Path(folder), name, "--client", "100000") as server:
                begun = time.perf_counter()
                with unhalted():
                    found = asyncio.run(PARTS[part](Asker(server, backbone, sizes)))
            found = {"part": part, "backbone": name, **found, **origin}
            files.write_json(Path(out) / f"soak-{part}.json", found)
            shown = {k: v for k, v in found.items() if k not in (*origin, "broken", "memory", "part")}
            print(f"{part}: {shown}  [{time.perf_counter() - begun:.0f} s]", flush=True)
            broken += [f"{part}: {line}" for line in found["broken"]]
    return broken


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--requests", type=int, default=Sizes.requests, help="of the soak")
    parser.add_argument("--aborts", type=int, default=Sizes.aborts)
    parser.add_argument("--seconds", type=float, default=Sizes.seconds, help="of overload and fairness")
    parser.add_argument("--swaps", type=int, default=Sizes.swaps)
    parser.add_argument("--backbone", default="builtin:lm")
    parser.add_argument("--out", default=str(RECORDS / "serve"), help="folder of the records")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = [part for part in given.only.split(",") if part]
    if unknown := set(names) - set(PARTS):
        raise SystemExit(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    sizes = Sizes(given.requests, given.aborts, given.seconds, given.swaps)
    origin = machine.provenance("cpu")
    machine.warn_if_busy(origin["load"])
    broken = run(names, sizes, given.out, origin, given.backbone)
    for line in broken:
        print(f"broken: {line}", file=sys.stderr)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
