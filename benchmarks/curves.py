"""How time and memory of a training step grow with P, B, the input length, K and V: ours, PEFT's, and the floor.

python -m benchmarks.curves [--only curve-P,curve-K]
A smaller Llama than W1's (4 layers of 256), so that all points fit into minutes; each point is measured as W1 is,
in turns of one step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine, workload
from benchmarks.w1_causal_training import floor_tokens
from benchmarks.workload import Plan, Variant
from incipit import files

STEP = "benchmarks.w1_causal_training"
BASE: dict[str, Any] = {"dtype": "float32", "lengths": [100], "batch": 8, "mean": 27, "labels": 1}


@dataclass(frozen=True)
class Axis:
    """What is varied, in words; its values; and what of BASE is otherwise for all of them."""

    says: str
    values: tuple[int, ...]
    otherwise: Mapping[str, Any]

    def settings(self, name: str, value: int) -> dict[str, Any]:
        """The settings of one point."""
        changes: dict[str, dict[str, Any]] = {
            "P": {"lengths": [value]},
            "B": {"batch": value},
            "T": {"mean": value},
            "K": {"lengths": [20] * value},
            "V": {"vocab": value},
        }
        return {**BASE, **self.otherwise, **changes[name]}


AXES = {
    "P": Axis("prompt length P", (1, 30, 300, 1000), {}),
    "B": Axis("rows of a step B", (1, 8, 64), {}),
    "T": Axis("mean input length", (8, 60, 240), {}),
    "K": Axis("prompts trained at once K (P = 20, B = 64)", (1, 8, 64), {"batch": 64}),
    "V": Axis("vocabulary V", (1_000, 16_000, 128_000), {}),
}
TOY = {"P": (1, 8), "B": (1, 4), "T": (4, 8), "K": (1, 2), "V": (320, 640)}


def names() -> list[str]:
    """Names of the records."""
    return [f"curve-{name}" for name in AXES]


def measured(name: str, plan: Plan) -> dict[str, Any]:
    """The points of one axis."""
    axis, points = AXES[name], []
    for value in TOY[name] if plan.toy else axis.values:
        settings = axis.settings(name, value) | {"shape": plan.shape("llama-curve"), "device": plan.device}
        if plan.toy:
            settings |= {
                "lengths": [min(n, 8) for n in settings["lengths"]],
                "batch": min(settings["batch"], 4),
            }
        variant = Variant("curve", f"{name}-{value}", axis.says, settings, tokens=floor_tokens)
        found = workload.measured(variant, STEP, plan.repeats, turn=0.0)
        print(f"  {workload.said(found)}", flush=True)
        kept = ("settings", "seconds", "ratio", "memory", "memory_ratio", "floor", "floor_ratio", "difference",
                "unequal", "peer")  # fmt: skip
        points.append({"value": value} | {k: found[k] for k in kept if k in found})
    return {"workload": "curve", "variant": name, "says": axis.says, "exact": True, "points": points}


def run(plan: Plan, origin: Mapping[str, Any], out: str, only: str = "") -> list[str]:
    """Measure the axes and write their records; returns what failed, in words."""
    failed = []
    starts = tuple(s for s in only.split(",") if s)
    for name in AXES:
        key = f"curve-{name}"
        if starts and not key.startswith(starts):
            continue
        print(f"{key}:", flush=True)
        found = measured(name, plan)
        wrong = [f"{key} at {p['value']}: {w}" for p in found["points"] for w in p["unequal"]]
        failed += wrong
        if not wrong:
            files.write_json(Path(out) / f"{key}.json", found | {"toy": plan.toy} | dict(origin))
    return failed


def main() -> None:
    """The command line."""
    given: argparse.Namespace = workload.options(__doc__ or "").parse_args()
    plan = workload.plan_of(given)
    origin = machine.provenance(plan.device)
    machine.warn_if_busy(origin["load"])
    sys.exit(1 if run(plan, origin, given.out, given.only) else 0)


if __name__ == "__main__":
    main()
