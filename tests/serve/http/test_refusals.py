"""What is refused, with which status, in OpenAI's shape, and that nothing is left behind."""

import asyncio
import io
import json
import logging
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from incipit.errors import ClientLimit, DataError, Draining, EngineDown, Saturated, StorageError, TooLong
from incipit.serve.asks import Delta, End
from incipit.serve.http import logs, rounds
from incipit.serve.http.app import Options
from incipit.serve.http.gate import Limits
from incipit.serve.http.keys import Keys, Rate

COMPLETE, CHAT, CLASSIFY = "/v1/completions", "/v1/chat/completions", "/v1/classify"
USER = [{"role": "user", "content": "hi"}]


def refused(reply: Any, status: int, code: str | None, says: str = "", param: str | None = None) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code and says in error["message"], error
    if param is not None:
        assert error["param"] == param
    assert reply.headers["x-request-id"]


# -- what is asked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "says"),
    [
        (COMPLETE, {"model": "moood", "prompt": "x"}, 404, "model_not_found", "did you mean 'mood'?"),
        (COMPLETE, {"model": "torn", "prompt": "x"}, 422, "prompt_refused", "truncated"),
        (COMPLETE, {"prompt": "x"}, 422, "invalid_value", "model: Field required"),
        (COMPLETE, {"model": "mood"}, 422, "invalid_value", "prompt"),
        (COMPLETE, {"model": "mood", "prompt": "x", "tools": []}, 422, "unknown_parameter", "'tools'"),
        (COMPLETE, {"model": "mood", "prompt": "x", "max_tokens": 0}, 422, "invalid_value", "max_tokens"),
        (COMPLETE, {"model": "mood", "prompt": "x", "max_tokens": "9"}, 422, "invalid_value", "max_tokens"),
        (COMPLETE, {"model": "mood", "prompt": "x", "n": 17}, 422, "invalid_value", "n: "),
        (COMPLETE, {"model": "mood", "prompt": "x", "presence_penalty": 1}, 400, "unsupported_parameter", "penalties"),
        (COMPLETE, {"model": "mood", "prompt": "x", "logit_bias": {"5": 1}}, 400, "unsupported_parameter",
         "logit_bias"),
        (COMPLETE, {"model": "mood", "prompt": "x", "logprobs": 3}, 400, "unsupported_parameter", "likeliest"),
        (COMPLETE, {"model": "mood", "prompt": "x", "echo": True}, 400, "unsupported_parameter", "echo"),
        (COMPLETE, {"model": "mood", "prompt": "x", "best_of": 2}, 400, "unsupported_parameter", "best_of"),
        (COMPLETE, {"model": "mood", "prompt": [999_999]}, 422, "invalid_value", "token id 999999"),
        (COMPLETE, {"model": "mood", "prompt": [-1]}, 422, "invalid_value", "prompt"),
        (COMPLETE, {"model": "mood", "prompt": []}, 422, "invalid_value", "prompt"),
        (COMPLETE, {"model": "mood", "prompt": "x", "stream_options": {}}, 422, "invalid_value", "without stream"),
        (COMPLETE, {"model": "llama", "prompt": "x", "form": True}, 400, "invalid_value", "no text form"),
        (COMPLETE, {"model": "mood", "prompt": ["x"] * 100, "n": 3}, 422, "too_many_rows", "300 answers"),
        (COMPLETE, {"model": "mood", "prompt": ["x"] * 257}, 422, "invalid_value", "prompt"),
        (CHAT, {"model": "talk", "messages": []}, 422, "invalid_value", "messages"),
        (CHAT, {"model": "talk", "messages": [{"role": "robot", "content": "x"}]}, 422, "invalid_value", "role"),
        (CHAT, {"model": "talk", "messages": USER, "tools": [{}]}, 400, "unsupported_parameter", "tools"),
        (CHAT, {"model": "talk", "messages": [*USER, {"role": "assistant", "content": "", "tool_calls": [{}]}, *USER]},
         400, "unsupported_parameter", "answers but text"),
        (CHAT, {"model": "talk", "messages": USER, "top_logprobs": 2}, 400, "unsupported_parameter", "likeliest"),
        (CHAT, {"model": "talk", "messages": USER, "response_format": {"type": "json_object"}}, 400,
         "unsupported_parameter", "response formats"),
        (CHAT, {"model": "talk", "messages": [*USER, {"role": "assistant", "content": "a"}]}, 422, "invalid_value",
         "last"),
        (CHAT, {"model": "talk", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 422,
         "invalid_value", "messages"),
        (CHAT, {"model": "talk", "messages": [{"role": "user", "content": "w " * 500}]}, 400,
         "context_length_exceeded", ""),
        (CLASSIFY, {"model": "mood", "input": []}, 422, "invalid_value", "input"),
        (CLASSIFY, {"model": "mood", "input": " "}, 200, None, ""),
        (CLASSIFY, {"model": "mood", "input": {"body": "x"}}, 422, "invalid_input", "no field 'text'"),
        (CLASSIFY, {"model": "pair", "input": "x"}, 422, "invalid_input", "reads 'a', 'b'"),
        (CLASSIFY, {"model": "mood", "input": {"text": ["x"]}}, 422, "invalid_input", "is a list"),
        (CLASSIFY, {"model": "mood", "input": ["x", {"text": None}]}, 422, "invalid_input", "input 1"),
        (CLASSIFY, {"model": "short", "input": "x"}, 400, "no_labels", "free text"),
        (CLASSIFY, {"model": "llama", "input": "x"}, 400, "no_labels", "name a prompt"),
        (CLASSIFY, {"model": "mood", "input": "w " * 500}, 400, "context_length_exceeded", "do not fit"),
        (CLASSIFY, {"model": "mood", "input": "x", "timeout": 0}, 422, "invalid_value", "timeout"),
    ],
)  # fmt: skip
def test_a_wrong_request(site: Any, path: str, body: Any, status: int, code: str | None, says: str) -> None:
    reply = site.post(path, **body)
    if status == 200:
        assert reply.status_code == 200
        return
    refused(reply, status, code, says)
    assert not site.engine.tickets and site.store.pins == 0


def test_an_encoder_writes_nothing(make: Any, bert: Any) -> None:
    site = make(backbone=bert)
    refused(site.post(COMPLETE, model="mood", prompt="x"), 400, "not_supported_by_model", "/v1/classify")
    refused(site.post(CHAT, model="mood", messages=USER), 400, "not_supported_by_model")
    assert site.store.pins == 0


def test_a_tokenizer_without_a_chat_template(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.engine.backbone.tokenizer, "chat_template", None)
    refused(site.post(CHAT, model="talk", messages=USER), 400, "no_chat_template", "/v1/completions")


def test_a_chat_template_that_raises(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.engine.backbone.tokenizer, "chat_template", "{{ raise_exception('secret') }}")
    reply = site.post(CHAT, model="talk", messages=USER)
    refused(reply, 422, "invalid_value", "chat template refuses")
    assert "secret" not in reply.text


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b"{" * 100_000, b"[" * 100_000, b'{"model": 1e999}',
     b'{"model": NaN}',
     b'{"n": ' + b"9" * 5000 + b"}", b'{"model": "\\ud800", "prompt": "x"}'],
)  # fmt: skip
def test_what_is_no_json_object(site: Any, body: bytes) -> None:
    reply = site.ask("POST", COMPLETE, content=body, headers={"content-type": "application/json"})
    assert reply.status_code in (400, 422), reply.text
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETE, b'{"model": "mood", "prompt": "\\ud800"}'),
        (CLASSIFY, b'{"model": "mood", "input": {"text": "\\udc00"}}'),
        (CHAT, b'{"model": "talk", "messages": [{"role": "user", "content": "\\ud800"}]}'),
    ],
)
def test_half_a_surrogate_pair(site: Any, path: str, body: bytes) -> None:
    reply = site.ask("POST", path, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 422, reply.text
    assert site.store.pins == 0


def test_a_body_of_another_type(site: Any) -> None:
    reply = site.ask(
        "POST", COMPLETE, content=b'{"model": "mood", "prompt": "x"}', headers={"content-type": "text/plain"}
    )
    refused(reply, 400, "invalid_json", "Content-Type: application/json")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", COMPLETE, 405)])
def test_no_such_address(site: Any, method: str, path: str, status: int) -> None:
    refused(site.ask(method, path), status, None, "no such")


# -- what the engine says --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code", "after"),
    [
        (TooLong("900 tokens do not fit in 128"), 400, "context_length_exceeded", None),
        (ClientLimit("8 requests under way", 2.5), 429, "rate_limit_exceeded", "3"),
        (Saturated("the queue is full", 0.2), 503, "overloaded", "1"),
        (Draining("shutting down"), 503, "shutting_down", "1"),
        (EngineDown("coming back", 4), 503, "engine_down", "4"),
        (DataError("no text"), 422, "invalid_input", None),
        (StorageError("the disk is gone"), 503, "storage", "1"),
    ],
)
def test_the_engine_takes_nothing(
    site: Any, error: Exception, status: int, code: str, after: str | None
) -> None:
    for body in ({}, {"stream": True}):
        site.engine.refuse = [error]
        reply = site.post(COMPLETE, model="mood", prompt="x", **body)
        refused(reply, status, code, str(error))
        assert reply.headers.get("retry-after") == after
    assert site.store.pins == 0


@pytest.mark.parametrize(
    ("end", "status", "code"),
    [
        (End("deadline", seconds=3.0), 504, "deadline_exceeded"),
        (End("overloaded", seconds=3.0), 503, "overloaded"),
        (End("error", error="the prompt gives NaN"), 500, "engine_error"),
        (End("cancelled"), 503, "cancelled"),
    ],
)
def test_a_row_that_fails(
    site: Any, end: End, status: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site.engine, "answer", lambda ticket: ticket.put(end))
    for path, body in (
        (COMPLETE, {"prompt": "x"}),
        (COMPLETE, {"prompt": "x", "stream": True}),
        (CLASSIFY, {"input": "x"}),
    ):
        refused(site.post(path, model="mood", **body), status, code, end.error)
    assert site.store.pins == 0


def test_a_stream_that_fails_later_says_so_in_an_event(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(ticket: Any) -> None:
        ticket.put(Delta((20,), "one"))
        ticket.put(End("error", error="the engine failed"))

    monkeypatch.setattr(site.engine, "answer", answer)
    reply = site.post(COMPLETE, model="mood", prompt="x", stream=True)
    assert reply.status_code == 200
    *_, error, done, _ = reply.text.split("\n\n")
    assert (
        json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_error" and done == "data: [DONE]"
    )


def test_one_row_fails_and_the_others_are_cancelled(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(ticket: Any) -> None:
        if len(site.engine.tickets) == 2:
            ticket.put(End("error", error="NaN"))

    monkeypatch.setattr(site.engine, "answer", answer)
    refused(site.post(CLASSIFY, model="mood", input=["a", "b", "c"]), 500, "engine_error", "NaN")
    first, _, third = site.engine.tickets
    assert site.engine.cancelled == [first, third] and site.store.pins == 0


def test_rows_beyond_a_clients_limit_wait_for_its_own(site: Any) -> None:
    site.engine.refuse = [None, None, ClientLimit("2 under way"), None, Saturated("full"), None]
    reply = site.post(CLASSIFY, model="mood", input=["a", "b", "c", "d"])
    assert reply.status_code == 200 and len(reply.json()["data"]) == 4
    ids = site.engine.backbone.text_ids
    assert [t.ask.ids for t in site.engine.tickets] == [tuple(ids(f"Review: {x}")) for x in "abcd"]


def test_a_prompt_that_loads_too_slowly(site: Any) -> None:
    site.store.slow = threading.Event()
    refused(site.post(COMPLETE, model="mood", prompt="x", timeout=0.01), 503, "overloaded", "within 0.0 s")
    site.store.slow.set()
    assert not site.engine.tickets


def test_rows_that_come_too_late_take_those_before_them_along(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row was taken when time ran out for the second."""
    gone, submit = [0.0], site.engine.submit

    def slow(ask: Any) -> Any:
        gone[0] += 1000
        return submit(ask)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + gone[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(rounds, "time", clock)
    monkeypatch.setattr(site.engine, "submit", slow)
    site.engine.by_hand = True
    refused(
        site.post(CLASSIFY, model="mood", input=["a", "b"], timeout=50), 503, "overloaded", "within 50.0 s"
    )
    assert len(site.engine.tickets) == 1 and site.engine.cancelled == site.engine.tickets
    assert site.store.pins == 0


def test_a_mistake_of_ours_is_told_without_its_message(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    undo = logs.turn_on(said)
    try:
        site.engine.refuse = [RuntimeError("the words of a client")]
        refused(
            site.post(COMPLETE, model="mood", prompt="the words of a client"),
            500,
            "internal_error",
            "the server failed",
        )
    finally:
        undo()
    (line,) = [json.loads(line) for line in said.getvalue().splitlines()]
    assert (
        line["level"] == "error"
        and line["error"] == "RuntimeError"
        and any("submit" in at for at in line["at"])
    )
    assert "words of a client" not in said.getvalue() and site.store.pins == 0


# -- cards of strangers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "asked", "says"),
    [
        (
            {"input": "{text} {referent}", "reshape": "wsc"},
            {"text": "a b", "span2_text": "b", "span2_index": "one"},
            "field 'span2_index' holds 'one'; write the pronoun's place among the words",
        ),
        (
            {"input": "{paragraph}", "reshape": "multirc"},
            {"passage": {"text": "a", "questions": [3]}},
            "field 'passage.questions.0' is a number, not an object",
        ),
        ({"input": 7}, "x", "does not fit the text form"),
        ({"input": "{text}", "words": 7}, "x", "does not fit the text form"),
        ({"input": "{text}", "words": [None, 3]}, "x", "does not fit the text form"),
        ({"input": None}, "x", "does not fit the text form"),
    ],
)
def test_a_record_or_a_form_of_other_types(site: Any, task: Any, asked: Any, says: str) -> None:
    site.store.versions["mood"].card["task"] = {"kind": "classification", **task}
    refused(site.post(CLASSIFY, model="mood", input=asked), 422, "invalid_input", says)
    if isinstance(asked, str):
        reply = site.post(COMPLETE, model="mood", prompt=asked, form=True)
        refused(reply, 422, "invalid_input", says)
    assert site.store.pins == 0


@pytest.mark.parametrize(
    "recipe",
    [
        ["x"], {"decode": 3}, {"decode": {"max_new_tokens": "many"}}, {"decode": {"max_new_tokens": 0}},
        {"decode": {"sample": True, "temperature": [1]}}, {"decode": {"sample": True, "top_p": 7}},
    ],
)  # fmt: skip
def test_a_recipe_that_does_not_say_how_to_decode(site: Any, recipe: Any) -> None:
    site.store.versions["mood"].card["recipe"] = recipe
    refused(
        site.post(COMPLETE, model="mood", prompt="x"), 422, "prompt_refused", "does not say how to decode"
    )
    assert site.store.pins == 0


def test_the_place_of_the_library_is_not_told(make: Any) -> None:
    site = make(Options(hidden=("/srv/a", "a")))
    site.engine.refuse = [StorageError("reading '/srv/a/mood/card.json' or 'a/mood' failed: call a person")]
    refused(
        site.post(COMPLETE, model="mood", prompt="x"),
        503,
        "storage",
        "reading 'LIBRARY/mood/card.json' or 'LIBRARY/mood' failed: call a person",
    )


# -- who may ask -----------------------------------------------------------------------------------------------

KEYS = Keys.of(["# ours", "ann 0123456789abcdef", "fedcba9876543210  # no name"], "keys")


def test_keys(make: Any) -> None:
    site = make(Options(keys=KEYS))
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "0123456789abcdef"},
        {"authorization": "Bearer é"},
    ):
        raw = {name: value.encode("latin-1") for name, value in headers.items()}
        reply = site.ask("POST", COMPLETE, json={"model": "mood", "prompt": "x"}, headers=raw)
        refused(reply, 401, "invalid_api_key", "Authorization: Bearer")
        assert reply.headers["www-authenticate"] == "Bearer"
    assert site.ask("GET", "/v1/models").status_code == 401
    for key, name in (("0123456789abcdef", "key:ann"), ("fedcba9876543210", "key:key-3")):
        headers = {"authorization": f"bearer {key}"}
        assert (
            site.ask("POST", COMPLETE, json={"model": "mood", "prompt": "x"}, headers=headers).status_code
            == 200
        )
        assert site.engine.tickets[-1].ask.client == name
    for path in ("/", "/healthz", "/readyz", "/metrics", "/openapi.json"):
        assert site.ask("GET", path).status_code == 200


def test_a_key_may_hold_the_sign_of_a_comment() -> None:
    keys = Keys.of(["ann 0123456789abcdef#1 # hers", "#0123456789abcdef", " # none"], "keys")
    assert keys.name("Bearer 0123456789abcdef#1") == "ann" and keys.name("Bearer 0123456789abcdef") is None


@pytest.mark.parametrize("line", ["short", "a b 0123456789abcdef", "ann 123"])
def test_a_line_that_is_no_key(line: str) -> None:
    with pytest.raises(DataError, match="keys:1 is no key: write KEY or NAME KEY"):
        Keys.of([line], "keys")


def test_two_keys_of_one_name() -> None:
    with pytest.raises(DataError, match="keys:2: two keys are named 'a'"):
        Keys.of(["a 0123456789abcdef", "a 0123456789abcdeg"], "keys")


def test_requests_a_second() -> None:
    now = [0.0]
    rate = Rate(2.0, lambda: now[0])
    assert [rate.wait("a") for _ in range(4)] == [0, 0, 0, 0]  # two seconds' worth at once
    assert rate.wait("a") == 0.5 and rate.wait("b") == 0
    now[0] = 0.5
    assert rate.wait("a") == 0 and rate.wait("a") == 0.5


def test_a_client_that_asks_too_often(make: Any) -> None:
    site = make(Options(limits=Limits(rate=Rate(0.5, lambda: 0.0))))
    assert site.ask("GET", "/v1/models").status_code == 200
    reply = site.ask("GET", "/v1/models")
    refused(reply, 429, "rate_limit_exceeded", "0.5 requests a second")
    assert reply.headers["retry-after"] == "2"
    assert site.ask("GET", "/healthz").status_code == 200


def test_a_body_that_is_too_large(make: Any) -> None:
    site = make(Options(limits=Limits(max_body=100)))
    for content in (b"x" * 101, iter([b"x" * 60, b"x" * 60])):
        sent = content if isinstance(content, bytes) else _chunks(content)
        reply = site.ask("POST", COMPLETE, content=sent, headers={"content-type": "application/json"})
        refused(reply, 413, "body_too_large", "100 bytes")
        assert reply.headers["connection"] == "close"


def raw(site: Any, *messages: Any) -> list[Any]:
    """What a request gets whose client sends these ASGI messages, and then neither more nor an end."""
    sent: list[Any] = []
    come = list(messages)

    async def receive() -> Any:
        if come:
            return come.pop(0)
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": COMPLETE, "raw_path": COMPLETE.encode(), "query_string": b"",
             "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "scheme": "http",
             "server": ("x", 80), "root_path": "", "http_version": "1.1"}  # fmt: skip
    asyncio.run(site.gate(scope, receive, send))
    return sent


def test_a_body_that_does_not_come(make: Any) -> None:
    site = make(Options(limits=Limits(body_seconds=0.01)))
    start, body = raw(site, {"type": "http.request", "body": b"{", "more_body": True})
    assert start["status"] == 408 and (b"connection", b"close") in start["headers"]
    assert json.loads(body["body"])["error"]["code"] == "body_timeout"


def test_a_stream_that_is_left_before_it_began(site: Any) -> None:
    site.engine.by_hand = True
    asked = json.dumps({"model": "mood", "prompt": "x", "stream": True}).encode()
    body = {"type": "http.request", "body": asked, "more_body": False}
    assert raw(site, body, {"type": "http.disconnect"}) == [] and len(site.engine.cancelled) == 1
    count = f'incipit:http_requests_total{{route="{COMPLETE}",status="499"}} 1.0'
    assert count in site.ask("GET", "/metrics").text.splitlines()


async def _chunks(parts: Any) -> Any:
    for part in parts:
        yield part


# -- request ids and logs --------------------------------------------------------------------------------------


def test_request_ids(site: Any) -> None:
    assert (
        site.ask("GET", "/healthz", headers={"x-request-id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    )
    for bad in ("a b", "x" * 65, "a\x7f"):
        assert site.ask("GET", "/healthz", headers={"x-request-id": bad}).headers["x-request-id"] != bad


def test_the_log_has_a_line_a_request_and_no_text(site: Any) -> None:
    said, before = io.StringIO(), list(logging.getLogger("incipit.serve").handlers)
    undo = logs.turn_on(said)
    try:
        site.post(COMPLETE, model="best", prompt="a very private sentence", max_tokens=2)
        site.post(COMPLETE, model="private name", prompt="x")
        site.ask("GET", "/private/path?private=1")
        site.ask("GET", "/healthz")
    finally:
        undo()
    first, second, third = (json.loads(line) for line in said.getvalue().splitlines())
    assert (
        first["event"] == "request"
        and first["model"] == "mood"
        and first["tokens"] == 2
        and first["rows"] == 1
    )
    assert (first["method"], first["route"], first["status"]) == ("POST", COMPLETE, 200)
    assert second["model"] == "" and second["status"] == 404 and third["route"] == "unmatched"
    assert "private" not in said.getvalue()
    assert logging.getLogger("incipit.serve").handlers == before
