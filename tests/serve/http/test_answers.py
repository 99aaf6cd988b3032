"""What the three endpoints ask of the engine, and what they say of its answers."""

import json
from typing import Any

import pytest

from incipit.serve.asks import Choose, Sampling


def streamed(text: str) -> list[Any]:
    """The messages of a stream; [DONE] is its last."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# -- completions -----------------------------------------------------------------------------------------------


def test_a_completion(site: Any) -> None:
    reply = site.post("/v1/completions", model="mood", prompt="the film", max_tokens=2)
    assert reply.status_code == 200, reply.text
    said = reply.json()
    assert said["object"] == "text_completion" and said["model"] == "mood"
    assert said["choices"] == [
        {"index": 0, "text": "w0 w1 .", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    words = len(site.engine.backbone.text_ids("the film"))
    assert said["usage"] == {
        "prompt_tokens": 4 + words, "completion_tokens": 2, "total_tokens": 6 + words,
        "prompt_tokens_details": {"cached_tokens": 4},
    }  # fmt: skip
    assert said["system_fingerprint"] == "mood@" + "1" * 12
    assert said["id"] == "cmpl-" + reply.headers["x-request-id"]
    (ticket,) = site.engine.tickets
    assert ticket.ask.ids == tuple(site.engine.backbone.text_ids("the film"))  # word for word: no text form
    assert ticket.ask.task == "mood" and ticket.ask.client.startswith("ip:")
    assert 0 < ticket.ask.timeout <= 60
    assert site.store.pins == 0


def test_a_text_in_the_prompts_own_form(site: Any) -> None:
    assert site.post("/v1/completions", model="mood", prompt="fine", form=True).status_code == 200
    assert site.engine.tickets[0].ask.ids == tuple(site.engine.backbone.text_ids("Review: fine"))


def test_the_bare_backbone_reads_its_opening_token(site: Any) -> None:
    reply = site.post("/v1/completions", model="llama", prompt="the film", max_tokens=1)
    assert reply.json()["system_fingerprint"] is None
    (ticket,) = site.engine.tickets
    bos = site.engine.backbone.tokenizer.bos_token_id
    assert ticket.ask.version is None and ticket.ask.ids[0] == bos and ticket.ask.task == ""


def test_how_to_write_is_passed_on(site: Any) -> None:
    way = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.25, "top_k": 3, "seed": 7, "stop": ["a", "b"]}
    site.post(
        "/v1/completions", model="mood", prompt="x", **way, stop_token_ids=[9], ignore_eos=True, logprobs=0
    )
    assert site.engine.tickets[0].ask.do == Sampling(
        max_new_tokens=5, temperature=0.5, top_p=0.25, top_k=3, seed=7, stop=("a", "b"), stop_ids=(9,),
        ignore_end=True, logprobs=True,
    )  # fmt: skip


def test_what_is_not_said_the_prompts_recipe_says(site: Any) -> None:
    site.post("/v1/completions", model="short", prompt="x")
    site.post("/v1/completions", model="short", prompt="x", temperature=0)
    site.post("/v1/completions", model="mood", prompt="x")
    drawn, greedy, plain = (ticket.ask.do for ticket in site.engine.tickets)
    assert drawn == Sampling(max_new_tokens=3, temperature=0.5, top_k=7)
    assert greedy == Sampling(max_new_tokens=3, temperature=0.0)
    assert plain == Sampling(max_new_tokens=16, temperature=0.0)


def test_several_prompts_and_several_answers(site: Any) -> None:
    reply = site.post("/v1/completions", model="mood", prompt=["a", "b"], n=2, seed=5, max_tokens=1)
    assert [choice["index"] for choice in reply.json()["choices"]] == [0, 1, 2, 3]
    ids = site.engine.backbone.text_ids
    assert [(t.ask.ids, t.ask.do.seed) for t in site.engine.tickets] == [
        (tuple(ids("a")), 5), (tuple(ids("a")), 6), (tuple(ids("b")), 5), (tuple(ids("b")), 6),
    ]  # fmt: skip


@pytest.mark.parametrize(("prompt", "rows"), [([5, 6], [(5, 6)]), ([[5], [6, 7]], [(5,), (6, 7)])])
def test_token_ids(site: Any, prompt: Any, rows: Any) -> None:
    assert site.post("/v1/completions", model="mood", prompt=prompt).status_code == 200
    assert [ticket.ask.ids for ticket in site.engine.tickets] == rows


def test_log_probabilities(site: Any) -> None:
    reply = site.post("/v1/completions", model="mood", prompt="x", max_tokens=2, logprobs=0)
    logs = reply.json()["choices"][0]["logprobs"]
    assert logs["token_logprobs"] == [0.0, -1.0] and logs["top_logprobs"] is None
    assert logs["tokens"] == [site.engine.backbone.piece(20), site.engine.backbone.piece(21)]


def test_a_stream(site: Any) -> None:
    body = {"model": "mood", "prompt": ["x", "y"], "max_tokens": 2, "stream": True}
    reply = site.post("/v1/completions", **body, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *pieces, last = streamed(reply.text)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4
    assert all(piece["usage"] is None and piece["object"] == "text_completion" for piece in pieces)
    texts = {0: "", 1: ""}
    for piece in pieces:
        (choice,) = piece["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "w0 w1 .", 1: "w0 w1 ."}
    assert [p["choices"][0]["finish_reason"] for p in pieces].count("length") == 2
    assert site.store.pins == 0


def test_a_stream_without_counts(site: Any) -> None:
    pieces = streamed(site.post("/v1/completions", model="mood", prompt="x", stream=True).text)
    assert all("usage" not in piece for piece in pieces)


# -- chat ------------------------------------------------------------------------------------------------------

TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the film"}]


def test_a_chat(site: Any) -> None:
    reply = site.post(
        "/v1/chat/completions", model="talk", messages=TURNS, max_completion_tokens=1, logprobs=True
    )
    assert reply.status_code == 200, reply.text
    said = reply.json()
    (choice,) = said["choices"]
    assert said["object"] == "chat.completion" and said["id"].startswith("chatcmpl-")
    assert choice["message"] == {"role": "assistant", "content": "w0 .", "refusal": None}
    piece = site.engine.backbone.piece(20)
    assert choice["logprobs"]["content"] == [
        {"token": piece, "logprob": 0.0, "bytes": list(piece.encode()), "top_logprobs": []}
    ]
    assert site.engine.tickets[0].ask.ids == site.engine.backbone.encode_asked(TURNS).input_ids
    assert site.engine.tickets[0].ask.do.max_new_tokens == 1


def test_a_streamed_chat(site: Any) -> None:
    reply = site.post("/v1/chat/completions", model="talk", messages=TURNS, max_tokens=2, stream=True)
    deltas = [piece["choices"][0]["delta"] for piece in streamed(reply.text)]
    assert deltas == [
        {"role": "assistant", "content": ""}, {"content": "w0 "}, {"content": "w1 "}, {"content": "."},
    ]  # fmt: skip


def test_parts_of_a_message_stand_on_lines_of_their_own(site: Any) -> None:
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "film"}]
    site.post("/v1/chat/completions", model="talk", messages=[{"role": "user", "content": parts}])
    one = [{"role": "user", "content": "the\nfilm"}]
    assert site.engine.tickets[0].ask.ids == site.engine.backbone.encode_asked(one).input_ids


# -- classify --------------------------------------------------------------------------------------------------


def test_texts_are_classified_in_the_prompts_form(site: Any) -> None:
    reply = site.post("/v1/classify", model="best", input=["fine", {"text": "poor"}])
    assert reply.status_code == 200, reply.text
    said = reply.json()
    assert said["model"] == "best" and said["system_fingerprint"] == "mood@" + "1" * 12
    assert said["data"][0] == {
        "index": 0, "label": "good", "probabilities": {"bad": 0.25, "good": 0.75}, "seconds": 0.5,
    }  # fmt: skip
    ids = site.engine.backbone.text_ids
    first, second = (ticket.ask for ticket in site.engine.tickets)
    assert first.ids == tuple(ids("Review: fine")) and second.ids == tuple(ids("Review: poor"))
    assert first.do == Choose((tuple(ids(" bad")), tuple(ids(" good"))))


def test_a_label_that_begins_another_is_closed(site: Any) -> None:
    site.post("/v1/classify", model="pair", input={"a": "x", "b": "y"})
    ends = site.engine.tickets[0].ask.do.ends
    assert {end[-1] for end in ends} == set(site.engine.backbone.eos_ids)


def test_an_encoder_has_its_classes_in_the_prompt(make: Any, bert: Any) -> None:
    site = make(backbone=bert)
    assert site.post("/v1/classify", model="mood", input="fine").status_code == 200
    (ticket,) = site.engine.tickets
    assert ticket.ask.do == Choose(((), ())) and ticket.ask.ids[-1] == bert.ending[0]


# -- models ----------------------------------------------------------------------------------------------------


def test_models(site: Any) -> None:
    listed = {model["id"]: model for model in site.ask("GET", "/v1/models").json()["data"]}
    assert set(listed) == {"llama", "mood", "best", "pair", "short", "talk"}  # not the broken one
    assert listed["llama"]["parent"] is None and listed["mood"]["parent"] == "llama"
    assert listed["best"]["root"] == "mood@" + "1" * 12 and listed["best"]["incipit"]["alias"]
    one = site.ask("GET", "/v1/models/mood").json()
    assert one["incipit"]["form"]["input"] == "Review: {text}" and one["incipit"]["scores"] == {
        "test": {"accuracy": 0.875}
    }
    assert one["root"] == site.ask("GET", "/v1/models/best").json()["root"] == "mood@" + "1" * 12
    assert "secret" not in site.ask("GET", "/v1/models/mood").text
    assert site.ask("GET", "/v1/models/llama").json()["incipit"]["chat"] is True


def test_a_card_that_is_no_proper_json_is_shown_nevertheless(site: Any) -> None:
    site.store.versions["mood"].card["scores"]["test"] = {"accuracy": float("nan"), "x": "\ud800"}
    one = site.ask("GET", "/v1/models/mood")
    assert one.status_code == 200 and one.json()["incipit"]["scores"]["test"]["accuracy"] is None


def test_what_several_answers_read_counts_once(site: Any) -> None:
    body = {"model": "mood", "prompt": ["the film", "x"], "n": 3, "max_tokens": 2}
    ids = site.engine.backbone.text_ids
    read = 2 * 4 + len(ids("the film")) + len(ids("x"))
    wanted = {"prompt_tokens": read, "completion_tokens": 12, "total_tokens": read + 12,
              "prompt_tokens_details": {"cached_tokens": 8}}  # fmt: skip
    assert site.post("/v1/completions", **body).json()["usage"] == wanted
    reply = site.post("/v1/completions", **body, stream=True, stream_options={"include_usage": True})
    assert streamed(reply.text)[-1]["usage"] == wanted


def test_a_card_of_members_without_a_rule_is_shown_nevertheless(site: Any) -> None:
    site.store.versions["mood"].card["members"] = [{}, 3]
    one = site.ask("GET", "/v1/models/mood")
    assert one.status_code == 200 and one.json()["incipit"]["members"] == ["", "3"]
