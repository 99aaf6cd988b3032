"""The HTTP side over the real engine and store: uploads, a hot swap under load, damaged files, saturation."""

import base64
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from incipit import artifact
from incipit.backbones import Backbone, GenerateOptions
from incipit.decode import predict
from incipit.ensemble import Ensemble, Saved, load, prompts_for, save
from incipit.prompts import InputPrompt
from incipit.questions import ask as question
from incipit.serve.client import Client
from incipit.serve.engine import Engine
from incipit.serve.http.app import Options, make_app
from incipit.serve.http.keys import Keys
from incipit.serve.scheduler import Limits
from incipit.serve.store import Store

KEY = "0123456789abcdef"
PATIENCE = 60
DECODE = {"decode": {"max_new_tokens": 4}}
FREE = {"kind": "text", "input": "{text}", "name": "said"}
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


class TestEnsembles:
    """Models like all others: listed, asked by name, told apart; and the same answers as on the command line."""

    @pytest.fixture
    def places(self, tmp_path: Path, llama: Backbone) -> Path:
        for seed, name in enumerate("abc"):
            for task, folder in ((TASK, name), (FREE, f"free-{name}")):
                rows = torch.randn(
                    3, llama.geometry.hidden, generator=torch.Generator().manual_seed(seed + 10)
                )
                prompt = InputPrompt(llama.geometry, 3, rows=rows)
                artifact.save(
                    tmp_path / "library" / folder, prompt=prompt, backbone=llama, name=folder, task=task,
                    recipe=DECODE,
                )  # fmt: skip
        for name, method, parts, task in (
            ("moods", "vote", "abc", TASK), ("mixed", "logits", "abc", TASK),
            ("says", "vote", ("free-a", "free-b", "free-c"), FREE),
        ):  # fmt: skip
            members = [artifact.load(tmp_path / "library" / part) for part in parts]
            made = Ensemble(prompts_for(members, llama, task.get("words", ())), method)
            save(
                tmp_path / "library" / name, name=name, ensemble=made, members=members, task=task,
                scores={"test": {"accuracy": 0.75}},
            )  # fmt: skip
        return tmp_path / "library"

    @pytest.fixture
    def url(self, places: Path, llama: Backbone, listen: Any) -> Iterator[str]:
        engine = Engine(llama, rows=8, room=100)
        gate = make_app(engine, Store(places, llama), Options(admin=Keys.of([KEY], "admin")))
        with listen(gate) as (url, _):
            while httpx.get(f"{url}/readyz", timeout=PATIENCE).status_code != 200:
                engine.drained(0.05)
            yield url

    def test_all_of_it(self, url: str, places: Path, llama: Backbone) -> None:
        said = httpx.get(f"{url}/v1/models", timeout=PATIENCE).json()["data"]
        about = {one["id"]: one["incipit"] for one in said}
        assert about["moods"] | {"scores": 0} == {
            "task": "", "kind": "classification", "words": ["bad", "good"], "parameters": 288, "prompt": "ensemble",
            "length": 3, "scores": 0, "method": "vote", "members": ["a", "b", "c"], "alias": False,
        }  # fmt: skip
        assert "method" not in about["a"]
        card = httpx.get(f"{url}/v1/models/mixed", timeout=PATIENCE).json()["incipit"]
        assert card["form"] == TASK and card["members"] == ["a", "b", "c"] and card["length"] == 3

        client, texts = Client(url), ["a fine film", "dull", "red", "no"]
        asked = [(text, "") for text in texts]
        pairs = [(i, k) for i in range(4) for k in range(4)]
        names = ["moods", "mixed", "says", "a"]
        found = client.predict([client.prompt(name) for name in names], asked, pairs)
        for (i, k), ours in zip(pairs, found, strict=True):
            saved = artifact.load(places / "a") if k == 3 else load(places / names[k])
            example, way = [question(saved.task, texts[i])], GenerateOptions(4)
            if isinstance(saved, Saved):
                (theirs,) = saved.ensemble(llama).predict(llama, example, options=way)
            else:
                (theirs,) = predict(llama, [saved.prompt(llama)], example, options=way)
            assert ours.text == theirs.text.strip()
            assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-5)

        def post(path: str, **body: Any) -> httpx.Response:
            return httpx.post(f"{url}{path}", json=body, timeout=PATIENCE)

        reply = post("/v1/classify", model="moods", input="dull")
        assert reply.json()["system_fingerprint"].startswith("moods@")
        one = post("/v1/classify", model="a", input="dull").json()["usage"]["prompt_tokens"]
        assert reply.json()["usage"]["prompt_tokens"] == 3 * one
        whole = post("/v1/completions", model="says", prompt="red", n=2, temperature=1.0, seed=1)
        assert len(whole.json()["choices"]) == 2
        lines = post("/v1/completions", model="says", prompt="red", stream=True).text.splitlines()
        texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")]
        alone = post("/v1/completions", model="says", prompt="red").json()["choices"][0]["text"]
        assert texts == [alone, ""]
        for path, body, words in (
            (
                "/v1/completions",
                {"model": "mixed", "prompt": "red"},
                r"mixes scores of label words \(logits\)",
            ),
            ("/v1/completions", {"model": "says", "prompt": "red", "logprobs": 0}, "votes on whole texts"),
        ):
            reply = post(path, **body)
            assert reply.status_code == 422
            assert re.search(words, reply.json()["error"]["message"]), reply.text
        reply = post("/v1/classify", model="says", input="red")
        assert reply.status_code == 400 and "writes free text" in reply.json()["error"]["message"]

    def test_upload(self, url: str, places: Path) -> None:
        text = (places / "mixed" / "ensemble.json").read_text().replace('"mixed"', '"again"')
        files = {"ensemble.json": base64.b64encode(text.encode()).decode()}
        with httpx.Client(
            base_url=url, timeout=PATIENCE, headers={"authorization": f"Bearer {KEY}"}
        ) as client:
            reply = client.post("/v1/prompts", json={"files": files})
            assert reply.status_code == 201 and reply.json()["incipit"]["method"] == "logits", reply.text
            both = [client.post("/v1/classify", json={"model": m, "input": "dull"}).json()["data"][0]
                    for m in ("mixed", "again")]  # fmt: skip
            assert both[0]["probabilities"] == pytest.approx(both[1]["probabilities"], abs=1e-6)
            reply = client.delete("/v1/prompts/a")
            assert reply.status_code == 400 and "is made of a@" in reply.json()["error"]["message"]
