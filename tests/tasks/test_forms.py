"""Templates: plain substitution, dotted fields, escapes, and nothing else."""

import datetime
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incipit.errors import DataError
from incipit.tasks.forms import Form, escape


def test_fields_are_filled_and_listed_once() -> None:
    form = Form.parse("{a} and {b.c}, {a}{{x}}")
    assert form.fields == ("a", "b.c")
    assert form.fill({"a": "one", "b": {"c": 2}}) == "one and 2, one{x}"


@pytest.mark.parametrize(
    ("template", "record", "text"),
    [
        ("{{{a}}}", {"a": "x"}, "{x}"),
        ("{a.1}", {"a": ["x", "y"]}, "y"),
        ("{a.b}", {"a.b": "whole", "a": {"b": "part"}}, "whole"),
        ("{Review Text (1-5)}", {"Review Text (1-5)": "x"}, "x"),
        ("{a}", {"a": "{b}", "b": "never read"}, "{b}"),
        ("{a}", {"a": 2.5}, "2.5"),
        ("{a}", {"a": True}, "True"),
        ("{a}", {"a": datetime.date(2024, 1, 2)}, "2024-01-02"),
        ("", {}, ""),
    ],
)
def test_substitution(template: str, record: dict[str, object], text: str) -> None:
    assert Form.parse(template).fill(record) == text


@given(st.text(alphabet=st.one_of(st.sampled_from("{}a.:!"), st.characters())))
def test_an_escaped_text_comes_back(text: str) -> None:
    assert Form.parse(escape(text)).fill({}) == text


@given(st.text(), st.text(), st.text())
def test_a_value_is_never_read_as_a_template(before: str, value: str, after: str) -> None:
    form = Form.parse(escape(before) + "{x}" + escape(after))
    assert form.fill({"x": value}) == before + value + after


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a } b", "template 'a } b': lone '}' at character 3; write '}}' for the brace itself"),
        ("{a", "lone '{' at character 1; write '{{'"),
        ("{a}}", "lone '}' at character 4"),
        ("{}", "{} names no field; write {field}, or {{ }} for braces"),
        ("{a:>3}", "{a:>3} holds ':', and a template takes field names only"),
        ("{a!r}", "{a!r} holds '!r'"),
        ("{a[0]}", "{a[0]} holds '['"),
    ],
)
def test_a_bad_template_says_where(template: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        Form.parse(template)


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        ("{sentense}", {"sentence": "x"}, "no field 'sentense'; did you mean 'sentence'?"),
        ("{a.texd}", {"a": {"text": "x"}}, "no field 'a.texd'; did you mean 'a.text'?"),
        ("{a.__class__}", {"a": "x"}, "no field 'a.__class__': 'a' is text and holds no fields"),
        ("{a.7}", {"a": ["x"]}, "no field 'a.7': 'a' is a list of 1; pick an item, as a.0"),
        ("{a}", {"a": None}, "field 'a' is null; fill it in or remove the record"),
        ("{a}", {"a": float("nan")}, "field 'a' is nan; fill it in"),
        ("{a}", {"a": ["x"]}, "field 'a' is a list, not text; pick one part, as {a.0}"),
        ("{a}", {"a": {"b": 1}}, "field 'a' is an object, not text; pick one part, as {a.key}"),
        ("{a}", {"a": b"x"}, "field 'a' is a bytes, not text; store it as text"),
    ],
)
def test_a_bad_record_says_which_field(template: str, record: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        Form.parse(template).fill(record)
