"""What this machine is, how busy it is, and how fast it multiplies matrices."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from benchmarks.measure import synchronise
from benchmarks.models import DTYPES
from incipit import files, record
from incipit.backbones import reordered

BUSY = 0.5  # load average above which somebody else is at work


def described(device: str) -> dict[str, Any]:
    """Processor, cores, threads and device; no name of the machine."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30),
        "system": platform.system(),
        "device": name or "cpu",
    }


def provenance(device: str) -> dict[str, Any]:
    """Commit, dirty flag, versions, machine, load average and date; taken once, before the first workload."""
    found = record.provenance()
    versions = found["versions"] | files.package_versions("accelerate", "tokenizers")
    return {
        "commit": found["commit"],
        "dirty": found["dirty"],
        "versions": dict(sorted(versions.items())),
        "machine": described(device),
        "load": found["load"],
        "date": found["time"],
    }


def warn_if_busy(load: float | None) -> None:
    """Say on stderr that figures taken now are worth little."""
    if load is not None and load > BUSY:
        print(
            f"warning: the load average is {load:.2f} before the run: something else uses this machine, and the "
            "figures will tell of that too; wait until it is below "
            f"{BUSY}, and do not keep these records",
            file=sys.stderr,
        )


def product_rate(settings: Mapping[str, Any], shape: Mapping[str, Any], tokens: int) -> float:
    """Floating-point operations a second of the fastest matrix product: a square one, and those of the model."""
    hidden, ffn = shape["hidden"], shape["ffn"]
    square = max(64, min(4096 if settings["device"] != "cpu" else 1536, 4 * hidden))
    sizes = [(square, square, square), (tokens, hidden, ffn), (tokens, ffn, hidden), (tokens, hidden, hidden)]
    return max(_rate(*size, settings) for size in sizes)


def _rate(rows: int, inner: int, columns: int, settings: Mapping[str, Any]) -> float:
    """Of torch's product, and of the one with a weight in order, as frozen models here have them on a CPU."""
    where: Any = {"device": torch.device(settings["device"]), "dtype": DTYPES[settings["dtype"]]}
    layers = [torch.nn.Linear(inner, columns, bias=False, **where).requires_grad_(False) for _ in range(2)]
    reordered.attach(layers[1])
    left = torch.ones(rows, inner, **where)
    least = 0.01 if settings["shape"].endswith("-toy") else 0.25
    return 2.0 * rows * inner * columns / min(_seconds(layer, left, least) for layer in layers)


def products(settings: Mapping[str, Any], shape: Mapping[str, Any], tokens: int, asked: int = 0) -> float:
    """Seconds of a step's products with the weights of all layers, one after another and with nothing between them:
    forward and, where a step has four operations a weight, backward to the input. The median of some runs.

    asked: rows whose output alone is wanted, where that is counted: they alone go through the last layer past its keys
    and values, and through the output layer."""
    hidden, ffn = shape["hidden"], shape["ffn"]
    kv = hidden // shape["heads"] * shape.get("kv_heads", shape["heads"])
    keys = [(hidden, kv)] * 2
    others = [(hidden, hidden)] * 2 + [(hidden, ffn)] * 2 + [(ffn, hidden)]
    sizes = [(*size, tokens) for size in (keys + others) * (shape["layers"] - 1) + keys]
    sizes += [(*size, asked or tokens) for size in others]
    sizes += [(hidden, shape["vocab"], asked)] if asked else []
    where: Any = {"device": torch.device(settings["device"]), "dtype": DTYPES[settings["dtype"]]}
    model = torch.nn.ModuleList(
        torch.nn.Linear(inner, columns, bias=False, **where).requires_grad_(False)
        for inner, columns, _ in sizes
    )
    reordered.attach(model)
    learns = settings.get("passes", 4) == 4
    inputs = {(n, i): torch.ones(n, i, requires_grad=learns, **where) for i, _, n in sizes}
    outputs = {(n, o): torch.ones(n, o, **where) for _, o, n in sizes}

    def step() -> float:
        start = time.perf_counter()
        for layer, (inner, columns, rows) in zip(model, sizes, strict=True):
            y = layer(inputs[rows, inner])
            if learns:
                torch.autograd.grad(y, inputs[rows, inner], outputs[rows, columns])
        synchronise(where["device"])
        return time.perf_counter() - start

    step()  # puts the weights in order
    return median(step() for _ in range(5))


@torch.no_grad()
def _seconds(layer: torch.nn.Linear, left: torch.Tensor, least: float) -> float:
    """The median of some runs, that take `least` seconds together."""
    seconds: list[float] = []
    begun = time.perf_counter()
    while len(seconds) < 5 or (time.perf_counter() - begun < least and len(seconds) < 200):
        start = time.perf_counter()
        layer(left)
        synchronise(left.device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def _processor() -> str:
    """The model name that the system gives."""
    if files.exists("/proc/cpuinfo"):
        for line in files.read_bytes("/proc/cpuinfo").decode(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
