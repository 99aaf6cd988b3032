"""One record in, one Example out, per kind; a wrong record says which field and what to do."""

import re
from typing import Any

import pytest

from incipit.errors import DataError
from incipit.tasks.example import Example, Message
from incipit.tasks.kinds import builder
from incipit.tasks.records import Record
from incipit.tasks.spec import TaskSpec


def built(record: dict[str, Any], **spec: Any) -> Example:
    return builder(TaskSpec(name="t", train="a.jsonl", **spec))(Record(record, "a.jsonl:1"))


MOOD = {"kind": "classification", "input": "Review: {text}", "labels": ["bad", "good"]}
FIELDS = {"kind": "multiple_choice", "input": "{q}", "choices": ["{a}", "{b}"]}
LISTED = {"kind": "multiple_choice", "input": "{q}", "choices": "options.text", "labels": ["A", "B", "C"]}
TEXT = {"kind": "text", "input": "{q}", "target": "{a}"}
SPAN = {"kind": "span", "input": "{q}"}
CHAT = {"kind": "chat"}


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"{role} speaks"} for role in roles]}


def test_classification() -> None:
    assert built({"text": "Fine.", "label": 1}, **MOOD) == Example(
        "Review: Fine.", "good", ("bad", "good"), 1, ("good",), source="a.jsonl:1"
    )


@pytest.mark.parametrize("label", [1, "1", "no", 1.0])
def test_multiple_choice_by_index_or_option(label: object) -> None:
    example = built({"q": "?", "a": "yes", "b": "no", "label": label}, **FIELDS)
    assert (example.choices, example.choice, example.target) == (("yes", "no"), 1, "no")


def test_multiple_choice_by_letter_over_a_list_field() -> None:
    example = built({"q": "?", "options": {"text": ["x", "y"]}, "label": "B"}, **LISTED)
    assert (example.choices, example.choice, example.target) == (("x", "y"), 1, "y")


def test_an_option_that_is_a_number_and_no_ambiguity() -> None:
    assert built({"q": "?", "a": "7", "b": "9", "label": "9"}, **FIELDS).choice == 1


def test_text_by_template_or_answers() -> None:
    assert built({"q": "?", "a": 3}, **TEXT).target == "3"
    example = built({"q": "?", "refs": ["one", "two", "one"]}, kind="text", input="{q}", answers="refs")
    assert (example.target, example.references) == ("one", ("one", "two"))


@pytest.mark.parametrize(
    "answers", ["Rome", ["Rome", "Roma"], {"text": ["Rome", "Roma"], "answer_start": [3, 9]}]
)
def test_span_takes_a_text_a_list_or_squad(answers: object) -> None:
    example = built({"q": "?", "answers": answers}, **SPAN)
    assert example.target == "Rome"
    assert example.references == (("Rome",) if answers == "Rome" else ("Rome", "Roma"))


def test_chat() -> None:
    example = built(turns("system", "user", "assistant", "tool", "assistant"), **CHAT)
    assert (example.input, example.target, len(example.messages)) == ("", "", 5)
    assert example.messages[-1] == Message("assistant", "assistant speaks")
    assert example.answers() == ("assistant speaks",)


@pytest.mark.parametrize(
    ("spec", "record", "message"),
    [
        (MOOD, {"text": "Fine."}, "no field 'label'"),
        (MOOD, {"txt": "Fine.", "label": 1}, "no field 'text'; did you mean 'txt'?"),
        (
            MOOD | {"input": "{text}"},
            {"text": " \n", "label": 1},
            "the input is empty (field 'text'); write a text there",
        ),
        (MOOD, {"text": "Fine.", "label": "goood"}, "holds 'goood', which is no label; did you mean 'good'?"),
        (FIELDS, {"q": "?", "a": "x", "b": "", "label": 0}, "the option is empty (field 'b')"),
        (
            FIELDS,
            {"q": "?", "a": "x", "b": "y", "label": 2},
            "neither an option nor an index up to 1; for letters",
        ),
        (FIELDS, {"q": "?", "a": "x", "b": "y", "label": "B"}, 'for letters set labels = ["A", "B", ...]'),
        (
            FIELDS,
            {"q": "?", "a": "1", "b": "0", "label": "0"},
            "an option's text and another's index; set labels",
        ),
        (
            LISTED,
            {"q": "?", "options": {"text": ["x"]}, "label": "A"},
            "field 'options.text' holds one option",
        ),
        (LISTED, {"q": "?", "options": {"text": []}, "label": "A"}, "field 'options.text' holds nothing"),
        (
            LISTED,
            {"q": "?", "options": {"text": ["x", "y"]}, "label": "C"},
            "holds 'C', option 3 of 2; mend the label",
        ),
        (
            LISTED,
            {"q": "?", "options": {"text": ["x", "y"]}, "label": "D"},
            "holds 'D', which names no option; known",
        ),
        (TEXT, {"q": "?", "a": ""}, "the target is empty (field 'a')"),
        (TEXT, {"q": "?", "a": None}, "field 'a' is null"),
        (SPAN, {"q": "?", "answers": []}, "field 'answers' holds nothing; fill it or remove the record"),
        (SPAN, {"q": "?", "answers": ["x", ""]}, "field 'answers' holds an empty text"),
        (SPAN, {"q": "?", "answers": {"start": 1}}, "field 'answers' is an object; write a text, a list, or"),
        (SPAN, {"q": "?", "answers": ["x", None]}, "field 'answers.1' is null"),
        (CHAT, {"messages": "hi"}, "field 'messages' is text, not a list of messages"),
        (CHAT, {"messages": []}, "the last turn is missing; a chat to learn from ends with the assistant"),
        (CHAT, turns("user"), "the last turn is by 'user'; a chat to learn from ends with the assistant"),
        (CHAT, turns("system", "assistant"), "the chat has no user turn; there is nothing to answer"),
        (CHAT, turns("user", "system", "assistant"), "the system turn is number 2; it can only be the first"),
        (CHAT, turns("user", "asistant"), "field 'messages.1.role' is 'asistant'; did you mean 'assistant'?"),
        (CHAT, {"messages": ["hi"]}, 'field \'messages.0\' is text; write {"role": ..., "content": ...}'),
        (CHAT, {"messages": [{"role": "user"}]}, "no field 'content'"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": None}]},
            "field 'messages.0.content' is null; write the text",
        ),
        (CHAT, {"messages": [{"role": "user", "content": " "}]}, "field 'messages.0.content' is empty"),
    ],
)
def test_a_bad_record(spec: dict[str, Any], record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        built(record, **spec)
