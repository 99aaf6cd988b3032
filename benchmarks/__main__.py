"""All workloads in turn, then the page: python -m benchmarks [--only w1,w4] [--device cuda] [--data FOLDER]

W6 and W7 need SST-2, and time beyond the 25 minutes of the others: they run where --data is given. Records go to
--out; where that is benchmarks/records, docs/benchmarks.md and its figures are written anew.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import curves, machine, report, w6_time_to_accuracy, w7_one_epoch, workload
from incipit.errors import IncipitError

SCRIPTS = tuple(f"benchmarks.{name}" for name in report.SCRIPTS)


def main() -> None:
    """The command line."""
    parser = workload.options(__doc__ or "")
    parser.add_argument("--data", default="", help="folder of SST-2, for w6 and w7")
    parser.add_argument("--accuracy", type=float, default=0.6, help="w6: dev accuracy to reach")
    parser.add_argument("--fraction", type=float, default=1.0, help="w7: share of an epoch")
    given = parser.parse_args()
    plan = workload.plan_of(given)
    origin, begun, failed = machine.provenance(plan.device), time.perf_counter(), []
    machine.warn_if_busy(origin["load"])
    for script in SCRIPTS:
        failed += workload.run_script(script, plan, origin, given.out, given.only)
    if plan.kind == "cpu":
        failed += curves.run(plan, origin, given.out, given.only)
        if given.data or plan.toy:
            _long(given, plan, origin)
    if Path(given.out).resolve() == workload.RECORDS and not plan.toy:
        report.write()
    print(f"{time.perf_counter() - begun:.0f} s", flush=True)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def _long(given: argparse.Namespace, plan: workload.Plan, origin: dict[str, Any]) -> None:
    """W6 and W7, as far as their backbones are there."""
    parts: dict[str, Callable[[], None]] = {
        "w6": lambda: w6_time_to_accuracy.run(plan, origin, given.out, given.data, given.accuracy),
        "w7": lambda: w7_one_epoch.run(plan, origin, given.out, given.data, fraction=given.fraction),
    }
    starts = [s[:2] for s in given.only.split(",") if s]
    for name, run in parts.items():
        if not starts or name in starts:
            try:
                run()
            except IncipitError as error:
                print(f"{name}: not measured: {error}", flush=True)


if __name__ == "__main__":
    main()
