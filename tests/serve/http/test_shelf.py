"""Changing prompts over HTTP: with a key of its own, and not at all without one. Also figures, health and the page."""

import base64
from typing import Any

import pytest

from incipit.serve.asks import State
from incipit.serve.http.app import Options, called
from incipit.serve.http.keys import Keys

ADMIN = Keys.of(["root 0123456789abcdef"], "admin")
ASKING = Keys.of(["fedcba9876543210"], "keys")
HEAD = {"authorization": "Bearer 0123456789abcdef"}


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/prompts"), ("POST", "/v1/prompts"), ("DELETE", "/v1/prompts/mood"), ("PUT", "/v1/aliases/a"),
     ("DELETE", "/v1/aliases/a")],
)  # fmt: skip
def test_without_an_admin_key(make: Any, method: str, path: str) -> None:
    off = make(Options(keys=ASKING))
    reply = off.ask(method, path, headers={"authorization": "Bearer fedcba9876543210"})
    assert reply.status_code == 403 and "without --admin-keys" in reply.json()["error"]["message"]
    on = make(Options(keys=ASKING, admin=ADMIN))
    reply = on.ask(method, path, headers={"authorization": "Bearer fedcba9876543210"})
    assert reply.status_code == 401 and not on.store.calls


def test_upload_delete_alias(make: Any) -> None:
    site = make(Options(admin=ADMIN))
    files = {name: base64.b64encode(data).decode() for name, data in (("card.json", b"{}"), ("x", b"\0"))}
    reply = site.ask("POST", "/v1/prompts", json={"files": files, "name": "n"}, headers=HEAD)
    assert reply.status_code == 201 and reply.json()["id"] == "n" and reply.json()["version"] == "f" * 64
    reply = site.ask("PUT", "/v1/aliases/team/best", json={"target": "mood@1111"}, headers=HEAD)
    assert reply.status_code == 200 and reply.json()["aliases"] == ["team/best"]
    reply = site.ask("DELETE", "/v1/prompts/pair", headers=HEAD)
    assert reply.json() == {"id": "pair", "deleted": True, "versions": 1}
    assert site.ask("DELETE", "/v1/aliases/best", headers=HEAD).status_code == 200
    assert site.store.calls == [
        ("add", {"card.json": b"{}", "x": b"\0"}, "n"), ("alias", "team/best", "mood@1111"), ("delete", "pair"),
        ("unalias", "best"),
    ]  # fmt: skip
    torn = site.ask("GET", "/v1/prompts", headers=HEAD).json()["data"][-1]
    assert torn["id"] == "torn" and "truncated" in torn["refused"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", "/v1/prompts", {"files": {"card.json": "!"}}, 422, "not base64"),
        ("POST", "/v1/prompts", {"files": {"x": ""}}, 422, "lacks card.json"),
        ("POST", "/v1/prompts", {"files": {}}, 422, "files"),
        ("DELETE", "/v1/prompts/nobody", None, 404, "no prompt is named 'nobody'"),
        ("DELETE", "/v1/prompts/mood", None, 400, "alias 'best' points"),
        ("PUT", "/v1/aliases/a", {"target": "torn"}, 422, "truncated"),
        ("PUT", "/v1/aliases/llama", {"target": "mood"}, 400, "backbone's name"),
        ("DELETE", "/v1/aliases/nobody", None, 404, "no alias"),
    ],
)
def test_changes_that_are_refused(
    make: Any, method: str, path: str, body: Any, status: int, says: str
) -> None:
    reply = make(Options(admin=ADMIN)).ask(method, path, json=body, headers=HEAD)
    assert reply.status_code == status and says in reply.json()["error"]["message"]


def test_health_and_readiness(site: Any) -> None:
    assert site.ask("GET", "/healthz").json() == {"ok": True}
    assert site.ask("GET", "/readyz").json() == {"ready": True, "why": ""}
    site.engine.ready, site.engine.why = False, "checking itself"
    reply = site.ask("GET", "/readyz")
    assert reply.status_code == 503 and reply.json() == {"ready": False, "why": "checking itself"}
    site.engine.ready, site.gate.draining = True, True
    assert site.ask("GET", "/readyz").json()["why"] == "shutting down"
    reply = site.post("/v1/completions", model="mood", prompt="x")
    assert (
        reply.status_code == 503
        and reply.headers["retry-after"] == "1"
        and reply.headers["connection"] == "close"
    )


def figures(site: Any) -> dict[str, float]:
    lines = [line for line in site.ask("GET", "/metrics").text.splitlines() if not line.startswith("#")]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def test_figures_of_the_engine(site: Any) -> None:
    site.engine.now = State(
        ready=True, running=3, waiting=2, slots=8, tokens=400, tokens_reserved=100, steps=9, new_tokens=70,
        input_tokens=50, rows_per_step={1: 4, 3: 5}, tasks_per_step={1: 6, 2: 3}, finished={"stop": 5, "cancelled": 1},
        refused={"Saturated": 2}, cache_hits=7, cache_misses=1, cache_prompts=1, cache_bytes=1024, restarts=1,
    )  # fmt: skip
    found, of = figures(site), 'model_name="llama"'
    assert (
        found[f"vllm:num_requests_running{{{of}}}"] == 3 and found[f"vllm:num_requests_waiting{{{of}}}"] == 2
    )
    assert found[f"vllm:kv_cache_usage_perc{{{of}}}"] == 0.25
    assert (
        found[f"vllm:generation_tokens_total{{{of}}}"] == 70
        and found[f"vllm:prompt_tokens_total{{{of}}}"] == 50
    )
    assert found[f'vllm:request_success_total{{finished_reason="abort",{of}}}'] == 1
    assert found[f'incipit:requests_refused_total{{{of},reason="Saturated"}}'] == 2
    assert found[f'incipit:batch_tasks_bucket{{le="1.0",{of}}}'] == 6
    assert (
        found[f"incipit:batch_tasks_count{{{of}}}"] == 9 and found[f"incipit:batch_tasks_sum{{{of}}}"] == 12
    )
    assert found[f"incipit:prompt_cache_hits_total{{{of}}}"] == 7


def test_figures_of_requests(make: Any) -> None:
    site = make()
    site.post("/v1/completions", model="mood", prompt="x", max_tokens=3)
    site.post("/v1/classify", model="mood", input=["x", "y"])
    site.post("/v1/completions", model="nobody", prompt="x")
    found, of = figures(site), 'model_name="llama"'
    assert found[f"vllm:e2e_request_latency_seconds_count{{{of}}}"] == 3
    assert found[f"vllm:time_to_first_token_seconds_sum{{{of}}}"] == pytest.approx(0.2)
    assert found[f"vllm:inter_token_latency_seconds_count{{{of}}}"] == 2
    assert found[f"vllm:request_generation_tokens_sum{{{of}}}"] == 3
    assert found['incipit:http_requests_total{route="/v1/completions",status="200"}'] == 1
    assert found['incipit:http_requests_total{route="/v1/completions",status="404"}'] == 1
    assert found["incipit:http_requests_active"] == 0
    assert not [name for name in found if "mood" in name or "nobody" in name]


def test_figures_by_prompt_are_asked_for(make: Any) -> None:
    site = make(Options(by_prompt=True))
    site.post("/v1/classify", model="best", input=["x", "y"])
    assert figures(site)['incipit:answers_by_prompt_total{prompt="mood",reason="stop"}'] == 2


def test_what_a_backbone_is_called(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    assert called(str(tmp_path / "my-model")) == "my-model"
    assert called("builtin:lm") == "builtin:lm"
    monkeypatch.chdir(tmp_path / "my-model")
    assert called(".") == "my-model"


def test_the_page_brings_everything_along(site: Any) -> None:
    reply = site.ask("GET", "/")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    for outside in ("http://", "https://", "//cdn", " src=", "@import"):
        assert outside not in reply.text
