"""The load driver and the benchmark of the server, at toy size."""

from pathlib import Path
from typing import Any

import pytest
from benchmarks import load as driver
from benchmarks import serve
from benchmarks.workload import Plan

from incipit import files

ORIGIN = {
    "commit": "0" * 40,
    "dirty": False,
    "versions": {},
    "load": 0.0,
    "date": "2026-01-01T00:00:00+00:00",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_benchmark_at_toy_size(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    assert serve.run(Plan(toy=True, repeats=1), ORIGIN, str(tmp_path), "serve-2") == []
    found: Any = files.read_json(tmp_path / "serve-2-clients-3-prompts.json")
    assert found["closed"]["statuses"] == found["open"]["statuses"] == {"200": 6}
    assert found["difference"] == {"ids": 0.0} and found["mode"] == "batched" and found["toy"]
    assert set(found["seconds"]["samples"]) == {"ours", "peft", "per_task"}
    assert found["closed"]["first"]["p50"] > 0 and found["open"]["between"]["p99"] > 0


def test_the_driver_stays_on_this_machine() -> None:
    with pytest.raises(SystemExit, match="servers on this machine only"):
        driver.Driver({"url": "http://example.org:80"})


def test_percentiles() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [serve.percentile(values, p) for p in (50, 90, 99)] == [50, 90, 99]
    assert serve.percentile([3.0], 99) == 3 and serve.percentile([], 50) is None


def test_the_lines_of_the_table() -> None:
    loads = serve.loads(Plan())
    assert {load.clients for load in loads} == {1, 4, 16, 64} and {load.prompts for load in loads} == {
        1,
        16,
        1000,
    }
    assert all(load.settings["batch"] >= load.clients for load in loads)
    (promised,) = [load for load in loads if load.target]
    assert promised.key == "serve-16-clients-16-prompts" and promised.target == {"ratio": 6.0}
