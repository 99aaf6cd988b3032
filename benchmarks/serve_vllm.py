"""The server beside vLLM on the same model and prompts: requests a second, time to first token, time between tokens.

python -m benchmarks.serve_vllm [--only serve-vllm-32] [--python PATH] [--out FOLDER]
builtin:lm in float32, prompts of 100 rows, inputs of 27 tokens on the mean, 16 new tokens, greedy; 1 to 64 clients.
`incipit serve` and `vllm serve` each run in a process of their own, with as many threads to compute with; vLLM over the
bundle that `incipit export --to vllm` writes (--python: an interpreter that has it, else that of `make test-vllm`).
Both are loaded by the same driver over loopback in turn, in a closed loop for the throughput, then in an open loop at
half of our throughput for the times; the other one is idle meanwhile. Written tokens are compared on some requests.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, measure, rows, serve, soak_server, workload
from benchmarks.measure import Outcome
from benchmarks.serve import COMPARED, Load, drive, half, record, saved, served, told
from benchmarks.workload import Plan
from incipit import library
from incipit.backbones import Backbone
from incipit.backbones import load as loaded
from incipit.batch import Encoded
from incipit.interop import vllm

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
GRID = ((1, 16), (16, 16), (32, 16), (64, 16), (64, 1000))  # clients, prompts
TARGETS = {(32, 16): {"ratio": 1.0}}  # of the issue: at 32 clients at least vLLM's throughput
MODEL, WORDS = "builtin:lm", 8192
PATIENCE = 600.0  # seconds for vLLM to come up
# Rows of a block of its cache: 96 of the 100 rows of a prompt are then reused, with its own 128 none; on a processor it
# takes multiples of 32.
BLOCK = 32
OURS = ("--slots", "66", "--room", "512", "--waiting", "4096", "--client", "4096")


class Lm(Load):
    """A line over builtin:lm."""

    @property
    def key(self) -> str:
        """The record's name."""
        return super().key.replace("serve-", "serve-vllm-", 1)

    @property
    def encoded(self) -> list[Encoded]:
        """What is asked."""
        return rows.asked(self.settings, WORDS)

    def backbone(self) -> Backbone:
        """The model that is served."""
        return loaded(MODEL, dtype="float32", device="cpu")

    def soft(self, k: int) -> torch.Tensor:
        """Rows at the scale of the embeddings."""
        own = loaded(MODEL, dtype="float32", device="cpu").geometry
        source = torch.Generator().manual_seed(k + 1)
        return own.embedding_rms * torch.randn(self.settings["length"], own.hidden, generator=source)


def loads(plan: Plan) -> list[Load]:
    """The lines of the table; at toy size one of a random model."""
    if plan.toy:
        return [load for load in serve.loads(plan) if load.clients == 2]
    found: list[Load] = []
    for clients, prompts in GRID:
        settings = {"shape": MODEL, "device": "cpu", "dtype": "float32", "new": 16, "mean": 27, "length": 100,
                    "batch": max(32, 6 * clients), "lengths": [100] * prompts}  # fmt: skip
        found.append(Lm(clients, prompts, settings, TARGETS.get((clients, prompts), {})))
    return found


@contextmanager
def process(load: Load, place: Path) -> Iterator[str]:
    """The address of `incipit serve` over a library; a random model is on no disk, and served by a thread."""
    if isinstance(load, Lm):
        with soak_server.served(place, MODEL, *OURS) as ours:
            yield f"http://{ours.host}:{ours.port}"
    else:
        with served(load) as here:
            yield here.url


# -- vLLM ------------------------------------------------------------------------------------------------------


@contextmanager
def standing(line: str, python: str, *more: str) -> Iterator[str]:
    """vLLM started by a bundle's line, on a free port of this machine; yields its address. Ends with the block.

    more: further arguments. Raises RuntimeError with its last words where it does not come up.
    """
    (place,), (model, *arguments) = (shlex.split(part) for part in line.split(" vllm serve "))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *arguments, *more,
               "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    threads = torch.get_num_threads()
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {
        "PYTHONPATH": place.removeprefix("PYTHONPATH="), "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            _wait(process, port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            _end(process)


def _wait(process: subprocess.Popen[bytes], port: int, log: Any) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    log.seek(0)
    raise RuntimeError(f"vLLM did not come up:\n{log.read().decode(errors='replace')[-12000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and those that it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


class Peer:
    """vLLM behind its address."""

    def __init__(self, url: str, load: Load, ends: Sequence[int]) -> None:
        self.url, self.load, self.ends = url, load, set(ends)

    def write(self, index: Sequence[int]) -> list[list[int]]:
        """Tokens of some requests, cut at the end token."""
        found = []
        for i in index:
            asked = {"model": f"p{i % self.load.prompts}", "prompt": list(self.load.encoded[i].input_ids),
                     "max_tokens": self.load.settings["new"], "return_token_ids": True}  # fmt: skip
            (choice,) = posted(f"{self.url}/v1/completions", asked)["choices"]
            ids = choice["token_ids"]
            found.append(next((ids[:n] for n, i in enumerate(ids) if i in self.ends), ids))
        return found


def posted(url: str, body: Mapping[str, Any]) -> Any:
    """A JSON answer; RuntimeError with the server's words for any but 200."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url}: {error.code} {error.read().decode()}") from error


def version(python: str) -> str:
    """Of the vLLM that this interpreter has; SystemExit where it has none."""
    program = (
        "from importlib.metadata import packages_distributions as p, version as v; "
        "print(*(f'{n} {v(n)}' for n in p()['vllm'][:1]))"
    )
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False) if Path(
        python
    ).exists() else None  # fmt: skip
    if done is None or done.returncode:
        raise SystemExit(
            f"{python} has no vLLM: run make test-vllm once, or give --python an interpreter that has it"
        )
    return done.stdout.strip()


# -- records ---------------------------------------------------------------------------------------------------


def measured(load: Load, repeats: int, python: str) -> dict[str, Any]:
    """The record of one line, without provenance."""
    compared = range(min(COMPARED, len(load.encoded)))
    with tempfile.TemporaryDirectory() as folder:
        own = load.backbone()
        saved(load, own, f"{folder}/library")
        entries = [e.artifact for e in library.entries(f"{folder}/library") if e.artifact is not None]
        line = vllm.write(entries, own, f"{folder}/bundle")
        more = ("--block-size", str(BLOCK))
        with served(load) as here:
            mine, mode = Outcome(ids=here.write(compared)), here.engine.state().mode
        with process(load, Path(folder, "library")) as ours, standing(line, python, *more) as url:
            apart = measure.differences(mine, Outcome(ids=Peer(url, load, own.eos_ids).write(compared)))
            sides = {"ours": ours, "vllm": url}
            for side in sides.values():
                drive(side, load)  # loads every prompt that is asked, and warms the caches
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
            for _ in range(repeats):
                for name, side in sides.items():
                    runs[name].append(drive(side, load))
            samples = {name: [run["seconds"] for run in found] for name, found in runs.items()}
            rate = half(load, samples)
            opened = {name: drive(side, load, rate) for name, side in sides.items()}
    return record("serve-vllm", load, "vllm", samples, apart) | {
        "closed": {name: told(found[-1]) for name, found in runs.items()},
        "open": {"rate": rate} | {name: told(run) for name, run in opened.items()},
        "mode": mode,
        "peer": {"line": " ".join([line.split(" vllm serve ")[1].split(" ", 1)[1], *more])
                 .replace(folder, "FOLDER"), "threads": torch.get_num_threads()},
    }  # fmt: skip


def run(plan: Plan, origin: Mapping[str, Any], out: str, python: str, only: str = "") -> list[str]:
    """Measure the lines whose names begin so, write their records; returns what failed, in words."""

    def one(load: Load) -> dict[str, Any]:
        return measured(load, plan.repeats, python)

    return workload.run_lines(loads(plan), one, said, {"toy": plan.toy, **origin}, out, only)


def said(key: str, found: Mapping[str, Any]) -> str:
    """One line of progress."""
    rate, opened = found["requests_per_second"], found["open"]
    times = ", ".join(
        f"{name} first token p50 {serve.milliseconds(opened[name]['first']['p50'])} between "
        f"{serve.milliseconds(opened[name]['between']['p50'])}"
        for name in ("ours", "vllm")
    )
    both = f"{rate['ours']:.1f} requests/s, vLLM {rate['vllm']:.1f} ({found['ratio']:.2f}x)"
    return f"{key}: {both}; at half load {times}"


def main() -> None:
    """The command line; records go to benchmarks/records/serve unless --out says otherwise."""
    parser = workload.options(__doc__ or "")
    parser.add_argument("--python", default=str(PYTHON), help="an interpreter that has vLLM")
    parser.set_defaults(out=str(workload.RECORDS / "serve"), repeats=3)
    given = parser.parse_args()
    plan = workload.plan_of(given)
    if plan.toy:
        raise SystemExit("--toy: vLLM has no attention for heads so small; use --only serve-vllm-1")
    name, number = version(given.python).split()
    origin = machine.provenance(plan.device)
    origin["versions"] = dict(sorted((origin["versions"] | {name: number}).items()))
    machine.warn_if_busy(origin["load"])
    failed = run(plan, origin, given.out, given.python, given.only)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
