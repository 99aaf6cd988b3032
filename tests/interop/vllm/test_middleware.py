"""The middleware of a bundle: what vLLM reads is what the backbone reads, names are restored, the rest is refused."""

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.interop.vllm.conftest import LENGTHS, Call, asked
from tests.interop.vllm.fake import BASE, KEY, Fake, unpacked

from incipit import files
from incipit.artifact import Artifact
from incipit.backbones import Backbone, GenerateOptions, tiny, wrap
from incipit.batch import Encoded, collate

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEXTS = ["the movie", "is this a great book", "cat", ""]
NEW = 5


def alone(llama: Backbone, prompt: Artifact, ids: tuple[int, ...]) -> list[int]:
    part = prompt.prompt(llama).injection()
    options = GenerateOptions(max_new_tokens=NEW)
    return llama.generate(collate([Encoded(ids)]), part, options)[0]


def until_end(llama: Backbone, ids: list[int]) -> list[int]:
    ends = [n for n, i in enumerate(ids) if i in llama.eos_ids]
    return ids[: ends[0]] if ends else ids


# -- answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LENGTHS)
def test_a_completion_is_the_backbones_own(
    name: str, call: Call, llama: Backbone, shelved: dict[str, Artifact]
) -> None:
    for text in TEXTS:
        ids = tuple(llama.text_ids(text))
        for prompt in (text, list(ids)) if ids else (text,):
            found = call(COMPLETIONS, {"model": name, "prompt": prompt, "max_tokens": NEW, "temperature": 0})
            (choice,) = found.json["choices"]
            assert until_end(llama, choice["token_ids"]) == alone(llama, shelved[name], ids)
            assert found.json["usage"]["prompt_tokens"] == 1 + LENGTHS[name] + len(ids)


def test_what_vllm_is_sent(call: Call, fake: Fake, llama: Backbone, shelved: dict[str, Artifact]) -> None:
    found = call(COMPLETIONS, {"model": "mood", "prompt": ["cat", "the movie"], "max_tokens": 1})
    assert [choice["index"] for choice in found.json["choices"]] == [0, 1]
    sent = fake.seen[-1]
    assert "model" not in sent and "prompt" not in sent
    part = shelved["mood"].prompt(llama).injection()
    assert part.inputs is not None
    for data, text in zip(sent["prompt_embeds"], ["cat", "the movie"], strict=True):
        whole = torch.cat([part.inputs[0], llama.embed(llama.text_ids(text))])  # [1 + P + T, H]
        assert torch.equal(unpacked(data), whole)
        bos = llama.embed(llama.layout_ids("{bos}"))
        assert torch.equal(unpacked(data)[:1], bos)  # once, before the rows; the text brings none


def test_a_chat_is_the_backbones_own(call: Call, llama: Backbone, shelved: dict[str, Artifact]) -> None:
    for text in TEXTS:
        messages = [{"role": "user", "content": text}]
        found = call(CHAT, {"model": "mood", "messages": messages, "max_tokens": NEW})
        ids = llama.encode_asked(messages).input_ids
        assert until_end(llama, found.json["choices"][0]["token_ids"]) == alone(llama, shelved["mood"], ids)


def test_names_are_restored(call: Call, bundle: Path) -> None:
    version = files.read_json(bundle / "manifest.json")["prompts"]["mood"]["version"]
    question = {"model": "mood", "prompt": "the movie", "max_tokens": 4}
    found = call(COMPLETIONS, question)
    assert found.json["model"] == "mood" and found.json["system_fingerprint"] == f"mood@{version}"
    streamed = call(COMPLETIONS, question | {"stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert [event["model"] for event in streamed.events] == ["mood"] * 4
    assert {event["system_fingerprint"] for event in streamed.events} == {f"mood@{version}"}
    chat = {"model": "items", "messages": [{"role": "user", "content": "cat"}], "max_tokens": 2}
    assert call(CHAT, chat).json["model"] == "items"
    assert [event["model"] for event in call(CHAT, chat | {"stream": True}).events] == ["items"] * 2


def test_the_recipe_decides_where_the_request_does_not(call: Call, fake: Fake) -> None:
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0, "frequency_penalty": 0,
               "repetition_penalty": 1}  # fmt: skip
    sent = [
        ({"model": "mood"}, {"temperature": 0.0, "max_tokens": 16}),
        ({"model": "items"}, {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "max_tokens": 3}),
        ({"model": "items", "temperature": 2, "max_tokens": 1}, {"temperature": 2, "max_tokens": 1}),
        ({"model": "items", "top_k": 2}, {"temperature": 0.5, "top_p": 0.9, "top_k": 2, "max_tokens": 3}),
    ]
    for given, wanted in sent:
        assert call(COMPLETIONS, given | {"prompt": "cat"}).status == 200
        found = {k: v for k, v in fake.seen[-1].items() if k != "prompt_embeds"}
        assert found == neutral | wanted
    messages = [{"role": "user", "content": "cat"}]
    assert call(CHAT, {"model": "mood", "messages": messages, "max_completion_tokens": 2}).status == 200
    assert "max_tokens" not in fake.seen[-1]


def test_the_models_are_listed(call: Call, bundle: Path) -> None:
    listed = call("/v1/models").json
    base, *prompts = listed["data"]
    assert base["id"] == BASE and base["parent"] is None
    version = files.read_json(bundle / "manifest.json")["prompts"]["mood"]["version"]
    mood = {"id": "mood", "object": "model", "created": 1, "owned_by": "incipit", "root": f"mood@{version}",
            "parent": BASE, "max_model_len": 128, "permission": []}  # fmt: skip
    assert sorted(p["id"] for p in prompts) == ["items", "mood"] and mood in prompts
    assert call("/v1/models/mood").json == mood and call(f"/v1/models/{BASE}").json == base
    assert call("/v1/models/nobody").status == 404
    browser = call("/v1/models", origin=b"http://a.example")
    assert browser.headers["access-control-allow-origin"] == "http://a.example"


def test_everything_else_goes_through(call: Call, fake: Fake) -> None:
    plain = {"model": BASE, "prompt": "cat", "max_tokens": 1}
    assert call(COMPLETIONS, plain).json["model"] == BASE and fake.seen == [plain]
    assert call(COMPLETIONS, {"model": "nobody", "prompt": "cat"}).status == 404
    for body, status in ((b"{", 400), (b"[]", 400), (b'{"model": ["mood"]}', 404), (b"[" * 100_000, 400)):
        assert call(COMPLETIONS, body).status == status
    assert call("/v1/embeddings", {"model": "mood"}).status == 404
    assert call("/health").status == 404
    assert "/v1/models" not in fake.paths  # nothing was asked that concerns prompts


def test_an_address_below_a_root(call: Call) -> None:
    assert call("/v1/models/mood", root="/llm").json["id"] == "mood"
    assert call(COMPLETIONS, {"model": "mood", "prompt": "cat"}, root="/llm").json["model"] == "mood"


def test_other_kinds_of_connections_go_through(middleware: ModuleType) -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    for kind in ("lifespan", "websocket"):
        asyncio.run(middleware.Prompts(app)({"type": kind}, None, None))
    assert seen == ["lifespan", "websocket"]


# -- refusals ------------------------------------------------------------------------------------------------

CANNOT = {
    "presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.1, "echo": True, "suffix": "x",
    "prompt_logprobs": 1, "truncate_prompt_tokens": 4, "use_beam_search": True, "add_special_tokens": True,
    "prompt_embeds": "AAAA", "form": True, "continue_final_message": True, "chat_template": "{{ 1 }}",
}  # fmt: skip


@pytest.mark.parametrize("argument", CANNOT)
def test_an_argument_that_rows_do_not_bear(argument: str, call: Call, fake: Fake) -> None:
    found = call(COMPLETIONS, {"model": "mood", "prompt": "cat", argument: CANNOT[argument]})
    assert found.status == 400 and found.error["param"] == argument and argument in found.error["message"]
    assert found.error["code"] == "unsupported_parameter"
    assert all(len(body["prompt_embeds"]) == 4 for body in fake.seen)  # the probes, no question


def test_values_that_change_nothing_are_taken(call: Call) -> None:
    neutral = {
        "presence_penalty": 0,
        "repetition_penalty": 1.0,
        "frequency_penalty": None,
        "echo": False,
        "suffix": "",
    }
    assert call(COMPLETIONS, {"model": "mood", "prompt": "cat", "max_tokens": 1} | neutral).status == 200


def test_penalties_of_the_model_itself_are_refused_too(call: Call, fake: Fake) -> None:
    found = call(COMPLETIONS, {"model": BASE, "prompt": "cat", "presence_penalty": 1})
    assert found.status == 400 and "can end vLLM's engine (vLLM issue 57719)" in found.error["message"]
    assert fake.seen == []


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (None, "neither a text, nor token ids"),
        ([], "neither a text"),
        ([[]], "neither a text"),
        ([True], "neither a text"),
        ({"a": 1}, "neither a text"),
        ([1, "a"], "neither a text"),
        (["a", None], "neither a text"),
        ([10_000], r"token id 10000 is not in the vocabulary"),
        ([-1], "token id -1 is not"),
        ("\ud800", "half a surrogate pair"),
        ([5] * 128, "5 rows and a text of 128 tokens leave nothing of 128 positions"),
    ],
)
def test_prompts_that_are_none(prompt: Any, says: str, call: Call) -> None:
    found = call(COMPLETIONS, {"model": "mood", "prompt": prompt})
    assert found.status == 400 and says in found.error["message"] and found.error["param"] == "prompt"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"messages": []}, "no list of messages"),
        ({"messages": "cat"}, "no list of messages"),
        ({"messages": ["cat"]}, "no list of messages"),
        ({"messages": [{"role": "incipit", "content": "x"}]}, "has the role 'incipit'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "end with what is to be answered"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "takes no chat_template"),
        ({"add_generation_prompt": False}, "add_generation_prompt = false"),
    ],
)
def test_chats_that_are_none(body: dict[str, Any], says: str, call: Call) -> None:
    found = call(CHAT, {"model": "mood", "messages": [{"role": "user", "content": "cat"}]} | body)
    assert found.status == 400 and says in found.error["message"]


def test_sizes_are_bounded(call: Call, middleware: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    large = call(COMPLETIONS, b'{"model": "mood", "prompt": "' + b"a" * middleware.LARGEST_BODY + b'"}')
    assert large.status == 413 and large.error["code"] == "body_too_large"
    monkeypatch.setattr(middleware.shelf, "LARGEST", 2 * 6 * 32)  # two rows of 5 + 1 positions
    assert call(COMPLETIONS, {"model": "mood", "prompt": [[5], [5]], "max_tokens": 1}).status == 200
    many = call(COMPLETIONS, {"model": "mood", "prompt": [[5], [5], [5]]})
    assert many.status == 400 and "ask for fewer at once" in many.error["message"]


def test_a_client_that_goes_away_is_let_go(middleware: ModuleType, fake: Fake) -> None:
    async def gone() -> Any:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": []}
    asyncio.run(middleware.Prompts(fake)(scope, gone, None))
    assert fake.paths == []


# -- who may ask, and over which model -----------------------------------------------------------------------


def test_without_a_key_nothing_is_told(llama: Backbone, middleware: ModuleType) -> None:
    app = middleware.Prompts(Fake(llama, keyed=True))
    for body in ({"model": "mood", "prompt": "cat", "echo": True}, {"model": "mood", "prompt": None}):
        assert asked(app, COMPLETIONS, body).status == 401
        assert asked(app, COMPLETIONS, body, key=b"Bearer other").json == {"error": "Unauthorized"}
        assert asked(app, COMPLETIONS, body, key=KEY).status == 400
    assert asked(app, "/v1/models").status == asked(app, "/v1/models/mood").status == 401
    assert asked(app, "/v1/models/mood", key=KEY).status == 200
    assert asked(app, COMPLETIONS, {"model": "mood", "prompt": "cat", "max_tokens": 1}, key=KEY).status == 200


def test_another_model_is_found_out(middleware: ModuleType, fake: Fake, llama: Backbone) -> None:
    torch.manual_seed(5)
    model, tokenizer = tiny.build("llama")
    with torch.no_grad():
        for weight in model.model.layers.parameters():  # the same embeddings: only its answers tell
            weight.copy_(0.4 * torch.randn_like(weight))
    app = middleware.Prompts(Fake(wrap("other", model, tokenizer)))
    for _ in range(2):
        found = asked(app, COMPLETIONS, {"model": "mood", "prompt": "cat"})
        assert found.status == 500 and found.error["code"] == "wrong_backbone"
        assert "serves '/models/base', which does not answer as 'llama'" in found.error["message"]
    plain = {"model": BASE, "prompt": "cat", "max_tokens": 1}
    assert asked(app, COMPLETIONS, plain).status == 200  # it harms nobody else


def test_the_probes_are_asked_once(call: Call, fake: Fake) -> None:
    for _ in range(3):
        assert call(COMPLETIONS, {"model": "mood", "prompt": "cat", "max_tokens": 1}).status == 200
    assert [len(body["prompt_embeds"]) for body in fake.seen] == [4, 1, 1, 1]
    assert fake.paths.count("/v1/models") == 1


def test_another_form_of_answer_is_said(
    middleware: ModuleType, llama: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fake, "_choice", lambda self, *rest: {"index": 0, "text": "", "logprobs": None})
    found = asked(middleware.Prompts(Fake(llama)), COMPLETIONS, {"model": "mood", "prompt": "cat"})
    assert found.status == 500 and "in another form than 0.32.0" in found.error["message"]


def test_a_model_with_a_prompts_name(
    middleware: ModuleType, llama: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.interop.vllm.fake.BASE", "mood")
    found = asked(middleware.Prompts(Fake(llama)), COMPLETIONS, {"model": "mood", "prompt": "cat"})
    assert found.status == 500 and "start it with --served-model-name" in found.error["message"]


# -- damaged bundles -----------------------------------------------------------------------------------------


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def change(folder: Path, name: str, **tensors: Any) -> None:
    found, _ = files.load_tensors(folder / name)
    files.save_tensors(folder / name, found | tensors)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (torch.full((5, 32), torch.nan), "holds NaN or infinite numbers"),
        (torch.zeros(5, 31), r"of shape (5, 31), not float32 (5, 32)"),
        (torch.zeros(5, 32, dtype=torch.int64), "is torch.int64 of shape"),
        (torch.zeros(5, 32), "does not have the hash"),
    ],
)
def test_a_damaged_prompt_harms_nobody_else(
    rows: Any, says: str, copied: Path, middleware: ModuleType, fake: Fake
) -> None:
    change(copied, "prompts.safetensors", mood=rows)
    app = middleware.Prompts(fake, copied)
    for _ in range(2):
        found = asked(app, COMPLETIONS, {"model": "mood", "prompt": "cat"})
        assert (
            found.status == 500 and says in found.error["message"] and found.error["code"] == "damaged_prompt"
        )
    assert asked(app, COMPLETIONS, {"model": "items", "prompt": "cat", "temperature": 0}).status == 200


def test_embeddings_that_are_not_finite(
    copied: Path, middleware: ModuleType, fake: Fake, llama: Backbone
) -> None:
    table = files.load_tensors(copied / "embeddings.safetensors")[0]["rows"].clone()
    (cat,) = llama.text_ids("cat")
    table[cat] = torch.inf
    change(copied, "embeddings.safetensors", rows=table)
    app = middleware.Prompts(fake, copied)
    assert asked(app, COMPLETIONS, {"model": "mood", "prompt": "cat"}).error["code"] == "damaged_embeddings"
    assert asked(app, COMPLETIONS, {"model": "mood", "prompt": "dog", "max_tokens": 1}).status == 200


def test_a_bundle_that_is_not_whole_does_not_start(copied: Path, middleware: ModuleType) -> None:
    def broken(says: str) -> None:
        with pytest.raises(ValueError, match=says):
            middleware.Prompts(None, copied)

    change(copied, "embeddings.safetensors", rows=torch.zeros(3, 32))
    broken(r"embeddings.safetensors is \(3, 32\), not ")
    files.truncate(copied / "embeddings.safetensors", 40)
    broken("embeddings.safetensors is missing or damaged")
    files.save_tensors(copied / "prompts.safetensors", {"mood": torch.zeros(5, 32)})
    broken("prompts.safetensors lacks items")
    files.write_json(copied / "manifest.json", {"schema": 99})
    broken("a bundle of schema 99, this middleware reads 1")
    for text in ("{", "[]", "{}"):
        files.atomic_write(copied / "manifest.json", text)
        broken("is no bundle of prompts .*: write the bundle again with incipit export")


def test_it_needs_nothing_of_incipit(bundle: Path) -> None:
    program = (
        "import sys; sys.modules['incipit'] = sys.modules['transformers'] = None\n"
        "import incipit_prompts; print(sorted(incipit_prompts.Prompts(None).shelf.entries))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, cwd=bundle, check=False,
        env={"PYTHONPATH": str(bundle), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "['items', 'mood']", done.stderr
