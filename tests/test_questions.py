"""New inputs in the words of an artifact."""

from pathlib import Path

import pytest

from incipit.errors import DataError
from incipit.questions import ask, fields, parse, read_file
from incipit.tasks.example import Example, Message

MOOD = {"kind": "classification", "input": "Review: {text}", "words": ["bad", "good"]}
PAIR = {"kind": "classification", "input": "{a} or {b.c}", "words": ["no", "yes"]}
PICK = {"kind": "multiple_choice", "input": "{q}", "choices": ["{one}", "{two}"]}
LIST = {"kind": "multiple_choice", "input": "{q}", "choices": "options"}
CHAT = {"kind": "chat", "input": ""}


def test_a_text_fills_the_only_field() -> None:
    wanted = Example("Review: Fine.", "", choices=("bad", "good"))
    assert ask(MOOD, "Fine.") == ask(MOOD, {"text": "Fine.", "more": 1}) == wanted
    assert ask({"kind": "text", "input": "Q: {q}"}, "Why?") == Example("Q: Why?", "")


def test_several_fields_need_a_record() -> None:
    assert fields(PAIR) == ("a", "b.c")
    assert ask(PAIR, {"a": "x", "b": {"c": "y"}}).input == "x or y"
    with pytest.raises(
        DataError, match=r"f:2: a text fills one field, and the prompt's form reads 'a', 'b\.c'; give"
    ):
        ask(PAIR, "x", "f:2")


def test_options_come_from_templates_or_a_field() -> None:
    assert ask(PICK, {"q": "Which?", "one": "A", "two": "B"}).choices == ("A", "B")
    assert ask(LIST, {"q": "Which?", "options": ["A", "B", "C"]}).choices == ("A", "B", "C")
    assert fields(LIST) == ("q", "options") and fields(PICK) == ("q", "one", "two")


def test_a_chat_ends_with_what_is_to_be_answered() -> None:
    turns = (Message("user", "Hi"), Message("assistant", ""))
    assert ask(CHAT, "Hi").messages == turns
    assert ask(CHAT, {"messages": [{"role": "user", "content": "Hi"}]}).messages == turns


@pytest.mark.parametrize(
    ("form", "asked", "words"),
    [
        (MOOD, {"txt": "a"}, r"f:1: no field 'text'; did you mean 'txt'\?"),
        ({"kind": "text", "input": "{text}"}, {"text": " "}, "f:1: the input is empty; write a text there"),
        (LIST, {"q": "a", "options": ["A"]}, r"f:1: field 'options' is \['A'\]; write a list of two options"),
        (LIST, {"q": "a", "options": "AB"}, r"f:1: field 'options' is 'AB'; write a list of two options"),
        (CHAT, {"messages": []}, "f:1: the messages are no list; write"),
        (CHAT, {"messages": [{"role": "usr", "content": "a"}]}, "f:1: .* is no message; write"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "content": "a"}]},
            "the last message is the assistant's; end",
        ),
    ],
)
def test_what_cannot_be_asked(form: dict[str, object], asked: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        ask(form, asked, "f:1")


def test_a_stream_of_lines_or_of_records() -> None:
    assert parse(b"\xef\xbb\xbfone\r\n\n two\n", "s") == [("one", "s:1"), (" two", "s:3")]
    assert parse(b'{"a": 1}\n\n{"a": 2}\n', "s") == [({"a": 1}, "s:1"), ({"a": 2}, "s:3")]
    assert parse(b'{"a": 1}\nplain\n', "s") == [('{"a": 1}', "s:1"), ("plain", "s:2")]
    assert parse("{not json\na\u2028b".encode(), "s") == [("{not json", "s:1"), ("a\u2028b", "s:2")]
    assert parse(b"", "s") == []
    with pytest.raises(DataError, match="s:3: broken JSON among records; mend the line"):
        parse(b'{"a": 1}\n\n {"a": 2\n', "s")
    with pytest.raises(DataError, match=r"s: is not UTF-8 \(.* at byte 1\); convert it"):
        parse(b"a\xff", "s")


def test_a_file_of_records_or_of_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n\nFine.,1\n")
    ((record, place),) = read_file(str(tmp_path / "a.csv"))
    assert record == {"text": "Fine.", "n": "1"} and place.endswith("a.csv:2")
    (tmp_path / "a.txt").write_text("Fine.\n")
    assert read_file(str(tmp_path / "a.txt")) == [("Fine.", f"{tmp_path}/a.txt:1")]
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n{"text"\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        read_file(str(tmp_path / "bad.jsonl"))


def test_a_prompt_of_demonstrations_is_refused() -> None:
    form = {"kind": "classification", "input": "{text}", "words": ["bad", "good"], "demonstrations": 4}
    with pytest.raises(DataError, match="trained with 4 worked examples before each input"):
        ask(form, "Fine film.")
