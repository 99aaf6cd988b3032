"""The HTTP side over the real engine and store: uploads, a hot swap under load, damaged files, saturation."""

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from incipit import artifact
from incipit.backbones import Backbone
from incipit.prompts import InputPrompt
from incipit.serve.engine import Engine
from incipit.serve.http.app import Options, make_app
from incipit.serve.http.keys import Keys
from incipit.serve.scheduler import Limits
from incipit.serve.store import Store

KEY = "0123456789abcdef"
PATIENCE = 60
TASK = {"kind": "classification", "input": "Review: {text}", "words": ["bad", "good"]}


def written(folder: Path, backbone: Backbone, seed: int) -> Path:
    rows = torch.randn(3, backbone.geometry.hidden, generator=torch.Generator().manual_seed(seed))
    prompt = InputPrompt(backbone.geometry, 3, rows=rows)
    place = folder / str(seed)
    artifact.save(place, prompt=prompt, backbone=backbone, name="mood", task=TASK)
    return place


def files_of(place: Path) -> dict[str, str]:
    return {
        n: base64.b64encode((place / n).read_bytes()).decode() for n in ("card.json", "prompt.safetensors")
    }


@pytest.fixture
def client(llama: Backbone, tmp_path: Path, listen: Any) -> Iterator[httpx.Client]:
    (tmp_path / "library").mkdir()
    store = Store(tmp_path / "library", llama)
    engine = Engine(llama, limits=Limits(waiting=8, client=64), rows=4, room=100)
    gate = make_app(engine, store, Options(admin=Keys.of([KEY], "admin")))
    with listen(gate) as (url, _), httpx.Client(base_url=url, timeout=PATIENCE) as found:
        while found.get("/readyz").status_code != 200:
            engine.drained(0.05)  # a pause, not a wait
        found.headers["authorization"] = f"Bearer {KEY}"
        yield found


def test_a_hot_swap_under_load(client: httpx.Client, llama: Backbone, tmp_path: Path) -> None:
    places = [written(tmp_path, llama, seed) for seed in (1, 2)]
    versions = []
    for place in places:
        said = client.post("/v1/prompts", json={"files": files_of(place)})
        assert said.status_code == 201, said.text
        versions.append(said.json()["version"])
    assert client.put("/v1/aliases/now", json={"target": f"mood@{versions[0]}"}).status_code == 200
    body = {"model": "now", "input": "fine"}
    alone = {
        v: client.post("/v1/classify", json=body | {"model": f"mood@{v}"}).json()["data"] for v in versions
    }
    shares = {v: alone[v][0]["probabilities"]["good"] for v in versions}
    assert abs(shares[versions[0]] - shares[versions[1]]) > 1e-3

    def ask(_: int) -> dict[str, Any]:
        reply = client.post("/v1/classify", json=body)
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    with ThreadPoolExecutor(4) as pool:
        first = [pool.submit(ask, i) for i in range(20)]
        assert client.put("/v1/aliases/now", json={"target": f"mood@{versions[1]}"}).status_code == 200
        answers = [one.result(PATIENCE) for one in first] + [ask(0)]
    assert answers[-1]["system_fingerprint"] == f"mood@{versions[1][:12]}"
    for answer in answers:  # each wholly from the version that it names
        (version,) = [v for v in versions if answer["system_fingerprint"] == f"mood@{v[:12]}"]
        assert answer["data"][0]["probabilities"]["good"] == pytest.approx(shares[version], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f | {"prompt.safetensors": base64.b64encode(b"\x80\x04pickled").decode()}, "safetensors"),
        (lambda f: f | {"prompt.safetensors": f["prompt.safetensors"][:80]}, "truncated"),
        (lambda f: f | {"code.pkl": "AAAA"}, "pickles and other files"),
        (lambda f: {"card.json": f["card.json"]}, "not found"),
        (lambda f: f | {"card.json": base64.b64encode(b"{").decode()}, "JSON"),
    ],
)
def test_what_is_no_artifact(
    client: httpx.Client, llama: Backbone, tmp_path: Path, change: Any, says: str
) -> None:
    reply = client.post("/v1/prompts", json={"files": change(files_of(written(tmp_path, llama, 1)))})
    assert reply.status_code == 422 and says in reply.json()["error"]["message"], reply.text
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["llama"]


def test_saturation_is_503_and_passes(client: httpx.Client, llama: Backbone, tmp_path: Path) -> None:
    assert (
        client.post("/v1/prompts", json={"files": files_of(written(tmp_path, llama, 1))}).status_code == 201
    )
    body = {"model": "mood", "prompt": "fine", "max_tokens": 40, "ignore_eos": True}

    def ask(_: int) -> httpx.Response:
        return client.post("/v1/completions", json=body)

    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(ask, range(64)))
    assert {reply.status_code for reply in replies} <= {200, 429, 503}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies if reply.status_code != 200)
    texts = {reply.json()["choices"][0]["text"] for reply in replies if reply.status_code == 200}
    assert len(texts) == 1  # greedy: who was answered was answered alike
    assert ask(0).status_code == 200


def test_a_long_list_needs_no_more_than_the_queue_has(
    client: httpx.Client, llama: Backbone, tmp_path: Path
) -> None:
    assert (
        client.post("/v1/prompts", json={"files": files_of(written(tmp_path, llama, 1))}).status_code == 201
    )
    reply = client.post("/v1/classify", json={"model": "mood", "input": ["fine"] * 100})
    assert reply.status_code == 200, json.dumps(reply.json())
    assert len({round(row["probabilities"]["good"], 5) for row in reply.json()["data"]}) == 1
