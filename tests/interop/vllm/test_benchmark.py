"""The benchmark beside vLLM at toy size, the application in vLLM's shapes in vLLM's place; its part of the page."""

import asyncio
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from benchmarks import report, report_serve, serve_vllm
from benchmarks.serve import Load
from benchmarks.workload import Plan
from tests.interop.vllm.conftest import brought
from tests.interop.vllm.fake import Fake

from incipit import files

ORIGIN = {
    "commit": "0" * 40,
    "dirty": False,
    "versions": {},
    "load": 0.0,
    "date": "2026-01-01T00:00:00+00:00",
}


@contextmanager
def standing_fake(line: str, python: str, *more: str) -> Iterator[str]:
    """The bundle's middleware around the fake, over HTTP."""
    folder = line.split(" ")[0].removeprefix("PYTHONPATH=")
    middleware = brought(Path(folder))
    (toy,) = serve_vllm.loads(Plan(toy=True))
    app = middleware.Prompts(Fake(toy.backbone()))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()  # who asks before the application is up waits for it
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_benchmark_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_vllm, "standing", standing_fake)
    assert serve_vllm.run(Plan(toy=True, repeats=1), ORIGIN, str(tmp_path), "") == []
    found: Any = files.read_json(tmp_path / "serve-2-clients-3-prompts.json")
    assert found["difference"] == {"ids": 0.0} and found["toy"]
    for name in ("ours", "vllm"):
        assert found["closed"][name]["statuses"] == found["open"][name]["statuses"] == {"200": 6}
        assert found["open"][name]["first"]["p50"] > 0 and found["open"][name]["between"]["p99"] > 0
        assert len(found["seconds"]["samples"][name]) == 1
    assert found["ratio"] == pytest.approx(found["seconds"]["vllm"] / found["seconds"]["ours"])
    assert found["peer"]["line"].startswith(
        "--dtype float32 --enable-prompt-embeds --middleware incipit_prompts"
    )


def test_the_lines_of_the_table() -> None:
    loads = serve_vllm.loads(Plan())
    assert [load.clients for load in loads] == [1, 16, 32, 64, 64]
    assert {load.prompts for load in loads} == {16, 1000}
    (promised,) = [load for load in loads if load.target]
    assert promised.key == "serve-vllm-32-clients-16-prompts" and promised.target == {"ratio": 1.0}


def test_a_vllm_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"vLLM did not come up:\n.*No module named .?vllm"),
        serve_vllm.standing(f"PYTHONPATH={tmp_path} vllm serve model", sys.executable),
    ):
        pass
    with pytest.raises(SystemExit, match="has no vLLM: run make test-vllm once"):
        serve_vllm.version(sys.executable)
    with pytest.raises(SystemExit, match="has no vLLM"):
        serve_vllm.version(str(tmp_path / "python"))


def record(load: Load) -> dict[str, Any]:
    times = {"first": {"p50": 0.01, "p99": 0.02}, "between": {"p50": 0.003, "p99": None}}
    ours = {
        "title": "t",
        "settings": {"clients": load.clients, "prompts": load.prompts},
        "target": dict(load.target),
        "ratio": 1.25,
        "per_task_ratio": 1.11,
        "requests_per_second": {"ours": 50, "vllm": 40, "peft": 40, "per_task": 45},
    }
    both = isinstance(load, serve_vllm.Lm)
    if isinstance(load, serve_vllm.Lm):
        ours.pop("per_task_ratio")
    return ours | {"open": {"rate": 25, "ours": times, "vllm": times} if both else {"rate": 25, **times}}


def test_the_section_of_the_page() -> None:
    keys = ("serve-16-clients-16-prompts", "serve-vllm-32-clients-16-prompts")
    found = {key: record(report_serve.lines()[key]) for key in keys}
    text = report_serve.section(found, {keys[1]: "A note. "})
    assert "| 16, 16 | 50.0 | 40.0 | **1.2x** (target 6x) | 45.0 | 1.1x | 10 ms, 20 ms | 3 ms, - |\n" in text
    times = "10 ms, 20 ms | 10 ms, 20 ms | 3 ms, - | 3 ms, - |"
    assert f"| 32, 16 | 50.0 | 40.0 | **1.2x** (target 1x) | {times}\n" in text
    assert f"- `{keys[1]}`: A note.\n" in text and "Not measured yet: `serve-1-clients-16-prompts`" in text
    assert "## Serving" in report.page({}, {})
