import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import curves, machine, measure, report, report_serve, rows, workload
from benchmarks import w6_time_to_accuracy as w6
from benchmarks import w7_one_epoch as w7
from benchmarks.measure import Outcome
from benchmarks.workload import Plan

from incipit import files

ORIGIN = {"commit": "0" * 40, "dirty": False, "versions": {}, "load": 0.0, "date": "2026-01-01T00:00:00+00:00",
          "machine": {"processor": "p", "cores": 1, "threads": 1, "device": "cpu"}}  # fmt: skip
KEYS = {"workload", "variant", "ratio", "memory_ratio", "seconds", "difference", "target", "exact", "versions",
        "machine", "load", "date", "commit", "dirty"}  # fmt: skip
TOY = Plan(toy=True, repeats=1)


@pytest.fixture
def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of a fresh process takes seconds a variant; it has a test of its own."""
    monkeypatch.setattr(measure, "extra_memory", lambda module, settings, side: 2**20)


# -- the page ------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_records_say() -> None:
    found, notes = report.records(), files.read_toml(report.NOTES)
    assert files.read_bytes(report.PAGE).decode() == report.page(
        found, notes, report.records(report_serve.FOLDER)
    ), "run python -m benchmarks.report"
    for key in curves.names():
        assert (report.FIGURES / f"{key}.svg").exists() == (key in found)
    assert set(found) <= {*report.wanted(), *report.wanted("cuda"), *curves.names(), *report_serve.lines()}
    assert set(notes) <= {*report.wanted(), *report.wanted("cuda"), *report_serve.lines()}


def test_every_workload_is_on_the_page() -> None:
    text = files.read_bytes(report.PAGE).decode()
    for key in (*report.wanted(), *report.wanted("cuda"), *curves.names(), *report_serve.lines()):
        assert f"`{key}`" in text or f"figures/{key}.svg" in text, key


def test_the_targets_are_those_of_the_table() -> None:
    targets = {key: target.get("ratio") for key, (_, target) in report.wanted().items()}
    assert targets == {
        "w1-float32": 11, "w1-bfloat16": 10, "w1-every-token": 8, "w1-short-prompt": 5, "w1-long-inputs": 3.3,
        "w1-large-vocabulary": 15, "w2-joint": 1.3, "w2-isolated": 3.5, "w3-trained": 4, "w3-scored": 6,
        "w3-scored-anew": None, "w3-ensemble": 5, "w4-1000-rows": 10, "w4-200-rows": 3.3, "w5-greedy": 2.5,
        "w5-beams": 3, "w6-accuracy": 8, "w7-joint": 1.3, "w7-isolated": 3,
    }  # fmt: skip


def test_records_carry_their_origin() -> None:
    for name, record in report.records().items():
        assert {
            "workload",
            "variant",
            "exact",
            "versions",
            "machine",
            "load",
            "date",
            "commit",
            "dirty",
        } <= set(record), name
        assert not record["toy"], name


def test_a_page_of_one_record_and_a_toy(tmp_path: Path) -> None:
    one = ORIGIN | {
        "workload": "w1", "variant": "float32", "title": "t", "ratio": 12.0, "memory_ratio": 0.1, "floor_ratio": 1.1,
        "seconds": {"ours": 0.5, "peft": 6.0}, "difference": {"loss": 2e-7}, "exact": True, "toy": False,
    }  # fmt: skip
    files.write_json(tmp_path / "w1-float32.json", one)
    files.write_json(tmp_path / "w1-bfloat16.json", one | {"toy": True})
    found = report.records(tmp_path)
    assert set(found) == {"w1-float32"}
    text = report.page(found, {"w1-float32": "A note.", "w1-bfloat16": "Another."})
    row = "| `w1-float32` t | 500 ms | 6.00 s | **12.0x** | 11x | 0.10 (at most 0.11) | 1.10 (at most 1.20) |"
    row += " loss 2e-07 | yes |"
    assert row in text
    assert "A note." in text and "Another." not in text
    assert re.search(r"Not measured yet: `w1-bfloat16`", text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "yes"),
        ({"ratio": 10.9}, "no"),
        ({"memory_ratio": 0.2}, "no"),
        ({"floor_ratio": 1.3}, "no"),
        ({"ratio": None}, "no"),
    ],
)
def test_when_a_target_is_met(change: dict[str, float | None], says: str) -> None:
    target = {"ratio": 11, "memory_ratio": 1 / 9, "floor_ratio": 1.2}
    assert report.met(target, {"ratio": 11.0, "memory_ratio": 0.1, "floor_ratio": 1.2, **change}) == says
    assert report.met({}, {"ratio": 1.0}) == ""


# -- the scripts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", report.SCRIPTS)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.usefixtures("without_processes")
def test_a_script_at_toy_size(script: str, kind: str, tmp_path: Path) -> None:
    plan, only = Plan(toy=True, repeats=1, kind=kind), script[:2] + ("-cuda-1b" if kind == "cuda" else "")
    assert workload.run_script(f"benchmarks.{script}", plan, ORIGIN, str(tmp_path), only) == []
    found = {p.stem: files.read_json(p) for p in tmp_path.glob("*.json")}
    there = {k for k in report.wanted(kind) if k.startswith(only)}
    assert set(found) == there
    for record in found.values():
        assert set(record) >= KEYS
        assert record["difference"] and not record["unequal"]
        assert len(record["seconds"]["samples"]["ours"]) == len(record["seconds"]["samples"]["peft"]) == 1
        if kind == "cuda":
            assert record["settings"]["dtype"] == "bfloat16"
            assert script[:2] != "w1" or record["mfu"] == pytest.approx(1 / record["floor_ratio"])


@pytest.mark.usefixtures("without_processes")
def test_the_curves_at_toy_size(tmp_path: Path) -> None:
    assert curves.run(TOY, ORIGIN, str(tmp_path)) == []
    assert {p.stem for p in tmp_path.glob("*.json")} == set(curves.names())
    record = files.read_json(tmp_path / "curve-K.json")
    assert [p["value"] for p in record["points"]] == [1, 2]
    report.draw("curve-K", record, tmp_path)
    drawn = files.read_bytes(tmp_path / "curve-K.svg").decode()
    assert "arithmetic floor" in drawn
    report.draw("curve-K", record, tmp_path)
    assert files.read_bytes(tmp_path / "curve-K.svg").decode() == drawn
    assert "prompts trained at once" in report.page({"curve-K": record}, {})


def test_time_to_accuracy_at_toy_size(tmp_path: Path) -> None:
    w6.run(TOY, ORIGIN, str(tmp_path), "")
    record = files.read_json(tmp_path / "w6-accuracy.json")
    assert set(record["curves"]["peft"]) == {str(rate) for rate in w6.RATES}
    assert len(record["curves"]["ours"]) in (1, 2)  # scored after steps 2 and 4, or once when that was enough


@pytest.mark.slow
def test_one_epoch_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = report.ROOT
    monkeypatch.setenv("PYTHONPATH", f"{root / 'src'}:{root}")
    w7.run(TOY, ORIGIN, str(tmp_path), "")
    assert files.read_json(tmp_path / "w7-joint.json")["settings"]["steps"] == 2


@pytest.mark.slow
def test_the_command_and_memory_in_fresh_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = report.ROOT
    monkeypatch.setenv("PYTHONPATH", f"{root / 'src'}:{root}")
    command = [sys.executable, "-m", "benchmarks", "--toy", "--only", "w1-float32", "--repeats", "2", "--out"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    record = files.read_json(tmp_path / "w1-float32.json")
    assert record["memory"]["peft"] > 0 and record["toy"] and len(record["seconds"]["samples"]["ours"]) == 2
    assert "w1-float32: ours" in done.stdout


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = workload.options("").parse_args(["--device", "cuda"])
    with pytest.raises(SystemExit, match="torch finds no CUDA device here; use --device cpu"):
        workload.plan_of(given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert workload.plan_of(given) == Plan("cuda", "cuda")


# -- measuring -----------------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_workload() -> None:
    found = rows.lengths(32, 27)
    assert max(found) == 58 and 26.5 < sum(found) / 32 < 27.5 and found == rows.lengths(32, 27)
    assert sorted(found) == sorted(rows.lengths(32, 27, seed=1)) and found != rows.lengths(32, 27, seed=1)


def test_differences() -> None:
    ours = Outcome(loss=1.01, gradient=torch.tensor([3.0, 4.0]), ids=[[1, 2], [3]])
    peer = Outcome(loss=1.0, gradient=torch.tensor([3.0, 0.0]), ids=[[1, 9], [3, 4]])
    found = measure.differences(ours, peer)
    assert found == pytest.approx({"loss": 0.01, "gradient": 4 / 3, "ids": 2 / 4})
    said = measure.unequal(found, {"loss": 0.1, "gradient": 1e-4, "ids": 0.5})
    assert said == ["gradient differs by 1.3, at most 0.0001 is allowed"]
    assert measure.unequal({"loss": float("nan")}, {"loss": 1.0})


def test_sides_take_turns_and_their_own_seconds_count() -> None:
    calls: list[str] = []

    class Side:
        def __init__(self, name: str, seconds: float | None) -> None:
            self.name, self.seconds = name, seconds

        def warm(self) -> None:
            calls.append(f"warm {self.name}")

        def step(self) -> Outcome:
            calls.append(self.name)
            return Outcome(loss=1.0, seconds=self.seconds)

    sides = {"ours": Side("ours", 7.0), "peft": Side("peft", None)}
    seconds, last = measure.interleaved(sides, torch.device("cpu"), 3, turn=0.0)
    assert calls == ["warm ours", "warm peft", "ours", "peft", "peft", "ours", "ours", "peft"]
    assert seconds["ours"] == [7.0] * 3 and len(seconds["peft"]) == 3 and set(last) == {"ours", "peft"}


def test_a_turn_is_one_long_step_or_many_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 4 s and of 1/4, 3/8, 1/2 s by a clock of its own: the median of a turn counts."""
    now, taken = [0.0], {"ours": 0, "peft": 0}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    class Side:
        def __init__(self, name: str) -> None:
            self.name = name

        def warm(self) -> None:
            pass

        def step(self) -> Outcome:
            now[0] += 4.0 if self.name == "peft" else 0.25 + 0.125 * (taken[self.name] % 3)
            taken[self.name] += 1
            return Outcome()

    seconds, _ = measure.interleaved({n: Side(n) for n in taken}, torch.device("cpu"), 2, turn=1.0)
    assert seconds == {"ours": [0.375] * 2, "peft": [4.0] * 2} and taken == {
        "ours": 6,
        "peft": 2,
    }


def test_an_unequal_side_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import peer

    right = peer.Training.step

    def wrong(self: peer.Training) -> Outcome:
        found = right(self)
        assert found.loss is not None
        return Outcome(loss=found.loss * 1.001, gradient=found.gradient)

    monkeypatch.setattr(peer.Training, "step", wrong)
    failed = workload.run_script("benchmarks.w1_causal_training", TOY, ORIGIN, str(tmp_path), "w1-float32")
    assert len(failed) == 1 and failed[0].startswith("w1-float32: loss differs by 0.001, at most 1e-05")
    assert list(tmp_path.iterdir()) == []


def test_a_busy_machine_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    machine.warn_if_busy(0.4)
    machine.warn_if_busy(None)
    assert capsys.readouterr().err == ""
    machine.warn_if_busy(1.25)
    assert "the load average is 1.25 before the run" in capsys.readouterr().err
