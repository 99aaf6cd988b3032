"""Tokens become text piece by piece; the pieces are the whole, cut before the first stop text."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from incipit.serve.writing import Writing


def by_bytes(ids: Sequence[int]) -> str:
    """A tokenizer with one token a byte: half characters are common."""
    return bytes(ids).decode("utf-8", errors="replace")


def written(text: str, stop: Sequence[str] = ()) -> tuple[list[str], str | None]:
    writing, out = Writing(by_bytes, stop), []
    for token in text.encode():
        out.append(writing.take(token))
        if writing.stopped is not None:
            break
    return [*out, writing.end()], writing.stopped


def test_a_character_comes_when_it_is_whole() -> None:
    assert written("né") == (["n", "", "é", ""], None)


def test_what_may_begin_a_stop_text_is_held_back() -> None:
    assert written("one END two", ["END"]) == (["o", "n", "e", " ", "", "", "", ""], "END")
    assert written("EN", ["END"]) == (["", "", "EN"], None)


def test_the_stop_text_that_begins_first_counts() -> None:
    assert written("abcd", ["cd", "bcd"]) == (["a", "", "", "", ""], "bcd")


@given(st.text(alphabet="abé€\n", max_size=30), st.lists(st.text("abé", min_size=1, max_size=3), max_size=3))
def test_the_pieces_are_the_whole(text: str, stop: list[str]) -> None:
    pieces, stopped = written(text, stop)
    at = min((i for s in stop if (i := text.find(s)) >= 0), default=None)
    # a shorter stop text is met first even where a longer one begins before it
    assert "".join(pieces) == text[: len("".join(pieces))]
    if at is None:
        assert ("".join(pieces), stopped) == (text, None)
    else:
        assert stopped is not None and text.startswith("".join(pieces) + stopped)


def test_a_special_token_keeps_the_space_behind_it() -> None:
    words = {1: "a", 2: "", 3: "b"}  # a tokenizer that writes no space before a first word
    writing = Writing(lambda ids: " ".join(filter(None, (words[i] for i in ids))))
    assert [writing.take(i) for i in (1, 2, 2, 3, 3)] == ["a", "", "", " b", " b"]


def test_broken_bytes_do_not_hold_the_answer_back_for_ever() -> None:
    writing = Writing(by_bytes)
    assert "".join(writing.take(0xFF) for _ in range(30)).count("\ufffd") >= 24
