"""A workload's variants, how one is run beside PEFT, and the record that it leaves.

A script holds `variants(plan)` and SIDES = {"ours": ..., "peft": ...}, each made from a variant's settings alone, so
that a fresh process can make it too.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

import torch

from benchmarks import machine, measure
from benchmarks.models import SHAPES
from incipit import files

RECORDS = Path(__file__).parent / "records"
# ids: a random model has near-ties. rounding: our distance from float64 over PEFT's
STRICT = {"loss": 1e-5, "gradient": 1e-4, "logits": 1e-4, "ids": 0.02, "rounding": 3.0}
# bfloat16: 8 bits, and other sums of them
LOOSE = {"loss": 1e-2, "gradient": 1e-1, "logits": 5e-2, "ids": 1.0, "rounding": 3.0}


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    target: ratio (at least), memory_ratio and floor_ratio (at most). exact: whether ours computes PEFT's function.
    tokens: tokens that the arithmetic floor counts, None where no floor is drawn. asked: rows of a step that reach the
    output layer, where the floor counts it; settings["passes"] is the operations for each weight and token (4: forward
    and backward to the input).
    """

    workload: str
    name: str
    title: str
    settings: Mapping[str, Any]
    target: Mapping[str, float] = field(default_factory=dict)
    exact: bool = True
    memory: bool = True
    tokens: Callable[[Mapping[str, Any]], int] | None = None
    asked: int = 0

    @property
    def key(self) -> str:
        """The record's name."""
        return f"{self.workload}-{self.name}"

    @property
    def allowed(self) -> Mapping[str, float]:
        """Bounds of the differences."""
        if self.settings["dtype"] != "float32":
            return LOOSE
        joint = self.workload == "w2" and self.exact  # see its `check`
        return STRICT | {"gradient": 1e-3} if joint else STRICT


@dataclass(frozen=True)
class Plan:
    """What a run measures: on which device, at which sizes. kind: "cpu" or "cuda" (which workloads)."""

    device: str = "cpu"
    kind: str = "cpu"
    toy: bool = False
    repeats: int = measure.REPEATS

    def shape(self, name: str) -> str:
        """The name of the shape, or of its toy."""
        return f"{name.split('-')[0]}-toy" if self.toy else name


def options(description: str) -> argparse.ArgumentParser:
    """What every script takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda"')
    parser.add_argument("--plan", choices=("cpu", "cuda"), help="which workloads; default: the device's own")
    parser.add_argument(
        "--out", default=str(RECORDS), help="folder of the records (default: benchmarks/records)"
    )
    parser.add_argument(
        "--only", default="", help="comma-separated beginnings of record names, such as w1-bf,w4"
    )
    parser.add_argument("--repeats", type=int, default=measure.REPEATS, help="times that each side is timed")
    parser.add_argument(
        "--toy", action="store_true", help="tiny sizes in seconds, to see that the scripts run"
    )
    return parser


def plan_of(given: argparse.Namespace) -> Plan:
    """The plan that the arguments name; SystemExit for a device that is not there."""
    device = str(given.device)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"device {device!r}: torch finds no CUDA device here; use --device cpu")
    return Plan(device, given.plan or device.split(":")[0], given.toy, given.repeats)


class Keyed(Protocol):
    """A line of a table: its record has its key for a name."""

    @property
    def key(self) -> str:
        """The record's name."""


Line = TypeVar("Line", bound=Keyed)


def chosen(lines: Sequence[Line], only: str) -> list[Line]:
    """The lines whose record names begin as one of `only`."""
    starts = tuple(s for s in only.split(",") if s)
    return [line for line in lines if not starts or line.key.startswith(starts)]


def run_lines(
    lines: Sequence[Line],
    measure_one: Callable[[Line], dict[str, Any]],
    say: Callable[[str, Mapping[str, Any]], str],
    more: Mapping[str, Any],
    out: str,
    only: str = "",
) -> list[str]:
    """Measure lines in turn and write their records with `more` in each; returns what failed, in words.

    A line whose two sides are not equal leaves no record.
    """
    failed = []
    for line in chosen(lines, only):
        begun, key = time.perf_counter(), line.key
        found = measure_one(line) | dict(more)
        if wrong := "; ".join(found["unequal"]):
            failed.append(f"{key}: {wrong}")
            print(f"{key}: NOT EQUAL, no record: {wrong}", flush=True)
        else:
            files.write_json(Path(out) / f"{key}.json", found)
            print(f"{say(key, found)}  [{time.perf_counter() - begun:.0f} s]", flush=True)
        gc.collect()
    return failed


def main(module: str, description: str) -> None:
    """The command line of one script."""
    given = options(description).parse_args()
    plan = plan_of(given)
    origin = machine.provenance(plan.device)
    machine.warn_if_busy(origin["load"])
    sys.exit(1 if run_script(module, plan, origin, given.out, given.only) else 0)


def run_script(module: str, plan: Plan, origin: Mapping[str, Any], out: str, only: str = "") -> list[str]:
    """Run a script's variants in turn and write their records; returns what failed, in words."""

    def one(variant: Variant) -> dict[str, Any]:
        return measured(variant, module, plan.repeats)

    lines: list[Variant] = importlib.import_module(module).variants(plan)
    return run_lines(lines, one, lambda _, found: said(found), {"toy": plan.toy, **origin}, out, only)


def measured(variant: Variant, module: str, repeats: int, turn: float = measure.TURN) -> dict[str, Any]:
    """The record of one variant, without provenance. turn: seconds, at least, that a side goes on."""
    script = importlib.import_module(module)
    settings = dict(variant.settings)
    device = torch.device(settings["device"])
    sides: dict[str, measure.Side] = {name: make(settings) for name, make in script.SIDES.items()}
    toy = str(settings.get("shape", "")).endswith("-toy")
    seconds, outcomes = measure.interleaved(sides, device, repeats, 0.0 if toy else turn)
    apart = measure.differences(outcomes["ours"], outcomes["peft"])
    check = getattr(script, "check", None)
    if check is not None:
        apart |= check(settings, sides)
    ours, peer = median(seconds["ours"]), median(seconds["peft"])
    found: dict[str, Any] = {
        "workload": variant.workload,
        "variant": variant.name,
        "title": variant.title,
        "settings": settings,
        "target": dict(variant.target),
        "exact": variant.exact,
        "ratio": peer / ours,
        "seconds": {"ours": ours, "peft": peer, "samples": seconds},
        "difference": apart,
        "allowed": {name: variant.allowed[name] for name in apart},
        "unequal": measure.unequal(apart, variant.allowed),
        "peer": getattr(sides["peft"], "settings", {}),
    }
    if variant.tokens is not None:
        found |= _floor(variant, ours, peer)
    del sides, outcomes
    gc.collect()
    if variant.memory and not found["unequal"]:
        attention = found["peer"].get("attention")
        same = settings | ({"peer_attention": attention} if attention else {})
        used = {name: measure.extra_memory(module, same, name) for name in script.SIDES}
        found["memory"] = used
        found["memory_ratio"] = used["ours"] / max(1, used["peft"])
    return found


def _floor(variant: Variant, ours: float, peer: float) -> dict[str, Any]:
    """The least time that the matrix products can take: operations / measured rate."""
    from benchmarks.models import make, matrix_parameters

    assert variant.tokens is not None
    settings, shape = variant.settings, SHAPES[variant.settings["shape"]]
    with torch.device("meta"):
        weights = matrix_parameters(make({**settings, "device": "meta"})[0])
    tokens = variant.tokens(settings)
    rate = machine.product_rate(settings, shape, tokens)
    count = weights * tokens + variant.asked * shape["hidden"] * shape["vocab"]
    floor = settings.get("passes", 4) * count / rate
    products = machine.products(settings, shape, tokens, variant.asked)
    return {
        "floor": {
            "seconds": floor,
            "tokens": tokens,
            "parameters": weights,
            "product_rate": rate,
            "products": products,
        },
        "floor_ratio": ours / floor,
        "peer_floor_ratio": peer / floor,
        "products_ratio": products / floor,
        "mfu": floor / ours,
    }


def said(found: Mapping[str, Any]) -> str:
    """One line of progress."""
    parts = [
        f"{found['workload']}-{found['variant']}: ours {found['seconds']['ours']:.4g} s, "
        f"PEFT {found['seconds']['peft']:.4g} s, {found['ratio']:.2f}x"
    ]
    if "ratio" in found["target"]:
        parts[0] += f" (target {found['target']['ratio']:g}x)"
    if "memory_ratio" in found:
        parts.append(
            f"memory {found['memory_ratio']:.2f} of PEFT's {found['memory']['peft'] / 2**20:.0f} MiB"
        )
    if "floor_ratio" in found:
        parts.append(f"{found['floor_ratio']:.2f} times the floor (products {found['products_ratio']:.2f})")
    parts += [f"{name} apart {value:.1e}" for name, value in found["difference"].items()]
    return ", ".join(parts)
