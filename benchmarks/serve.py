"""The server over HTTP beside PEFT: requests a second, time to first token, time between tokens.

python -m benchmarks.serve [--only serve-16] [--toy] [--out FOLDER]
16 new tokens each, greedy, prompts of 100 rows, inputs of 27 tokens on the mean; 1 to 64 clients, 1 to 1000 prompts.
Ours is `incipit serve`'s own application on loopback, loaded by a process of its own: in a closed loop for the
throughput, then in an open loop at half of it for the times. The peers answer the same requests in this process,
without HTTP: PEFT switching by `set_adapter` for each request ("peft"), and PEFT's `generate` of each prompt's requests
in batches ("per_task"), which must know them all beforehand. Written tokens are compared on some of the requests.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import machine, measure, peer, rows, workload
from benchmarks.measure import Outcome
from benchmarks.models import SHAPES, backbone, soft_rows
from benchmarks.w5_generate import END
from benchmarks.workload import Plan
from incipit import artifact
from incipit.backbones import Backbone
from incipit.batch import Encoded, pad
from incipit.prompts import InputPrompt
from incipit.serve.asks import Ask, Sampling
from incipit.serve.engine import Engine
from incipit.serve.http.app import Options, make_app
from incipit.serve.http.server import Server, listening
from incipit.serve.scheduler import Limits
from incipit.serve.store import Store

GRID = ((1, 16), (4, 16), (16, 1), (16, 16), (16, 1000), (64, 16), (64, 1000))  # clients, prompts
TARGETS = {(16, 16): {"ratio": 6.0}}  # of the issue: 16 clients, against PEFT switching for each request
COMPARED = 4  # requests whose tokens are compared
LONGEST = 120.0  # seconds of one run of the driver
PATIENCE = 120.0  # seconds for a server to come up


@dataclass(frozen=True)
class Load:
    """One line of the table."""

    clients: int
    prompts: int
    settings: Mapping[str, Any]
    target: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The record's name."""
        return f"serve-{self.clients}-clients-{self.prompts}-prompts"

    @property
    def encoded(self) -> list[Encoded]:
        """What is asked; request i goes to prompt i modulo `prompts`."""
        return rows.asked(self.settings, SHAPES[self.settings["shape"]]["vocab"])

    def backbone(self) -> Backbone:
        """The model that is served."""
        return backbone(self.settings)

    def soft(self, k: int) -> torch.Tensor:
        """Rows of prompt k: [P, H]."""
        return soft_rows(self.settings, self.settings["length"], k + 1)


def loads(plan: Plan) -> list[Load]:
    """The lines of the table; at toy size two small ones."""
    found = []
    for clients, prompts in ((1, 2), (2, 3)) if plan.toy else GRID:
        settings: dict[str, Any] = {"shape": plan.shape("llama"), "device": plan.device, "dtype": "float32"}
        settings |= {"new": 16, "mean": 27, "length": 100, "batch": max(24, 3 * clients)}
        if plan.toy:
            settings |= {"new": 3, "mean": 6, "length": 5, "batch": 6}
        used = min(prompts, settings["batch"])
        settings["lengths"] = [settings["length"]] * used  # adapters of PEFT: those that are asked
        found.append(Load(clients, prompts, settings, TARGETS.get((clients, prompts), {})))
    return found


def drive(url: str, load: Load, rate: float = 0.0) -> dict[str, Any]:
    """One run of the driver against a server: a closed loop, or an open one at `rate` requests a second."""
    asked = [
        {"model": f"p{i % load.prompts}", "prompt": list(e.input_ids)} for i, e in enumerate(load.encoded)
    ]
    given = {"url": url, "requests": asked, "new": load.settings["new"], "rate": rate, "clients": load.clients,
             "seconds": LONGEST}  # fmt: skip
    driver = [sys.executable, str(Path(__file__).with_name("load.py"))]
    done = subprocess.run(driver, input=json.dumps(given), capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    if not rate and set(found["statuses"]) != {"200"}:
        raise RuntimeError(
            f"{load.key}: not every request of a closed loop was answered: {found['statuses']}"
        )
    return found


# -- ours ------------------------------------------------------------------------------------------------------


class Ours:
    """A library on disk, engine and server in this process, the driver in another one."""

    def __init__(self, backbone_: Backbone, engine: Engine, store: Store, url: str, load: Load) -> None:
        self.backbone, self.engine, self.store, self.url, self.load = backbone_, engine, store, url, load

    def write(self, index: Sequence[int]) -> list[list[int]]:
        """Tokens of some requests, asked for together, cut at the end token."""
        tickets = []
        for i in index:
            with self.store.pin(f"p{i % self.load.prompts}") as version:
                ids = self.load.encoded[i].input_ids
                tickets.append(self.engine.submit(Ask(ids, version, Sampling(self.load.settings["new"]))))
        for ticket in tickets:
            ticket.wait(PATIENCE)
        return [list(ticket.tokens) for ticket in tickets]


def saved(load: Load, own: Backbone, folder: str) -> None:
    """The prompts p0, p1, ... as artifacts."""
    for k in range(load.prompts):
        prompt = InputPrompt(own.geometry, load.settings["length"], rows=load.soft(k))
        task = {"kind": "text", "input": "{text}"}
        artifact.save(f"{folder}/p{k}", prompt=prompt, backbone=own, name=f"p{k}", task=task)


@contextmanager
def served(load: Load) -> Iterator[Ours]:
    """A server of `load.prompts` prompts on a free port."""
    own = load.backbone()
    with tempfile.TemporaryDirectory() as folder:
        saved(load, own, folder)
        store = Store(folder, own)
        engine = Engine(own, limits=Limits(waiting=4096, client=4096), rows=66, room=512)
        up, where = threading.Event(), list[int]()

        def listens(_: str, port: int) -> None:
            where.append(port)
            up.set()

        server = Server(make_app(engine, store, Options()), told=listens)
        sock = listening("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            begun = time.monotonic()
            while not (up.is_set() and engine.ready):
                if time.monotonic() - begun > PATIENCE:
                    raise RuntimeError(f"the server did not come up: {engine.why}")
                time.sleep(0.02)
            yield Ours(own, engine, store, f"http://127.0.0.1:{where[0]}", load)
        finally:
            server.drain()
            thread.join()


# -- PEFT ------------------------------------------------------------------------------------------------------


class Peft(peer.Peer):
    """The same requests, one by one or by prompt."""

    def __init__(self, load: Load) -> None:
        super().__init__(load.settings, inference=True)
        self.load, self.rows = load, load.encoded
        self.choose_attention(load.settings, lambda: self.write([0]))

    def adapter(self, i: int) -> int:
        """Of request i."""
        return i % len(self.load.settings["lengths"])

    def switching(self) -> float:
        """Seconds of all requests, one after another."""
        begun = time.perf_counter()
        for i in range(len(self.rows)):
            self.write([i])
        return time.perf_counter() - begun

    def per_task(self) -> float:
        """Seconds of all requests, those of one prompt together, at most `clients` of them."""
        begun = time.perf_counter()
        for k in range(len(self.load.settings["lengths"])):
            mine = [i for i in range(len(self.rows)) if self.adapter(i) == k]
            for at in range(0, len(mine), self.load.clients):
                self.write(mine[at : at + self.load.clients])
        return time.perf_counter() - begun

    @torch.no_grad()
    def write(self, index: Sequence[int]) -> list[list[int]]:
        """New ids of requests of one prompt, cut at the end token."""
        import warnings

        self.use(self.adapter(index[0]))
        ids, mask = pad([self.rows[i].input_ids for i in index], 0, "left")
        with warnings.catch_warnings():  # see w5_generate.py
            warnings.filterwarnings("ignore", "Position ids are not supported", UserWarning)
            out = self.model.generate(
                input_ids=ids.to(self.device), attention_mask=mask.long().to(self.device), do_sample=False,
                use_cache=True, max_new_tokens=self.load.settings["new"],
            )  # fmt: skip
        return [row[: row.index(END)] if END in row else row for row in out[:, ids.shape[1] :].tolist()]


# -- records ---------------------------------------------------------------------------------------------------


def record(
    name: str, load: Load, against: str, samples: Mapping[str, list[float]], apart: Mapping[str, float]
) -> dict[str, Any]:
    """What the records of all servers say. against: the side that ours is compared with."""
    count, seconds = len(load.encoded), {side: median(found) for side, found in samples.items()}
    return {
        "workload": name,
        "variant": load.key.removeprefix(f"{name}-"),
        "title": f"{load.clients} clients, {load.prompts:,} prompts, {load.settings['new']} new tokens",
        "settings": dict(load.settings)
        | {"clients": load.clients, "prompts": load.prompts, "requests": count},
        "target": dict(load.target),
        "exact": True,
        "ratio": seconds[against] / seconds["ours"],
        "seconds": {**seconds, "samples": samples},
        "requests_per_second": {side: count / s for side, s in seconds.items()},
        "difference": dict(apart),
        "allowed": {what: workload.STRICT[what] for what in apart},
        "unequal": measure.unequal(apart, workload.STRICT),
    }


def half(load: Load, samples: Mapping[str, list[float]]) -> float:
    """Requests a second: half of our throughput, at which the times are taken."""
    return len(load.encoded) / median(samples["ours"]) / 2


def measured(load: Load, repeats: int) -> dict[str, Any]:
    """The record of one line, without provenance."""
    compared = range(min(COMPARED, len(load.encoded)))
    with served(load) as ours:
        peft = Peft(load)
        apart = measure.differences(
            Outcome(ids=ours.write(compared)), Outcome(ids=[peft.write([i])[0] for i in compared])
        )
        ours.write(range(len(load.encoded)))  # loads every prompt that is asked
        samples: dict[str, list[float]] = {"ours": [], "peft": [], "per_task": []}
        closed: dict[str, Any] = {}
        for _ in range(repeats):
            closed = drive(ours.url, load)
            samples["ours"].append(closed["seconds"])
            samples["peft"].append(peft.switching())
            samples["per_task"].append(peft.per_task())
        rate = half(load, samples)
        opened = drive(ours.url, load, rate)
        state = ours.engine.state()
    found = record("serve", load, "peft", samples, apart)
    return found | {
        "per_task_ratio": found["seconds"]["per_task"] / found["seconds"]["ours"],
        "closed": told(closed),
        "open": {"rate": rate, **told(opened)},
        "mode": state.mode,
        "tasks_per_step": {str(k): v for k, v in sorted(state.tasks_per_step.items())},
        "peer": peft.settings,
    }


def told(run: Mapping[str, Any]) -> dict[str, Any]:
    """Percentiles of one run of the driver, in seconds, and its statuses."""
    found: dict[str, Any] = {"statuses": run["statuses"]}
    for name in ("first", "between", "whole"):
        found[name] = {f"p{p}": percentile(run[name], p) for p in (50, 90, 99)}
    return found


def percentile(values: Sequence[float], p: int) -> float | None:
    """The nearest rank; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * p // 100) - 1)] if ordered else None


def run(plan: Plan, origin: Mapping[str, Any], out: str, only: str = "") -> list[str]:
    """Measure the lines whose names begin so, write their records; returns what failed, in words."""

    def one(load: Load) -> dict[str, Any]:
        return measured(load, plan.repeats)

    return workload.run_lines(loads(plan), one, said, {"toy": plan.toy, **origin}, out, only)


def said(key: str, found: Mapping[str, Any]) -> str:
    """One line of progress."""
    rate, opened = found["requests_per_second"], found["open"]
    first, between = opened["first"], opened["between"]
    shown = milliseconds
    return (
        f"{key}: {rate['ours']:.1f} requests/s, PEFT {rate['peft']:.1f} switching ({found['ratio']:.1f}x) and "
        f"{rate['per_task']:.1f} by task ({found['per_task_ratio']:.1f}x); at half load first token p50 "
        f"{shown(first['p50'])} p99 {shown(first['p99'])}, between tokens p50 {shown(between['p50'])} "
        f"p99 {shown(between['p99'])}"
    )


def milliseconds(seconds: float | None) -> str:
    """As it is printed."""
    return "-" if seconds is None else f"{1000 * seconds:.1f} ms"


def main() -> None:
    """The command line; records go to benchmarks/records/serve unless --out says otherwise."""
    parser = workload.options(__doc__ or "")
    parser.set_defaults(out=str(workload.RECORDS / "serve"), repeats=3)
    given = parser.parse_args()
    plan = workload.plan_of(given)
    origin = machine.provenance(plan.device)
    machine.warn_if_busy(origin["load"])
    failed = run(plan, origin, given.out, given.only)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
