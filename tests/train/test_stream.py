"""Rows by seed and position."""

from collections import Counter

import pytest

from incipit.batch import Encoded
from incipit.errors import DataError
from incipit.train import ExampleStream


def encode(number: int) -> Encoded:
    return Encoded((number,))


def ids(stream: ExampleStream[int], count: int) -> list[int]:
    return [row.input_ids[0] for row in stream.next(count)]


def test_every_pass_holds_every_example_once_in_its_own_order() -> None:
    stream = ExampleStream(range(10), encode, seed=3)
    passes = [ids(stream, 10) for _ in range(3)]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert len({tuple(p) for p in passes}) == 3


def test_seeds_differ_and_repeat() -> None:
    orders = [ids(ExampleStream(range(10), encode, seed=s), 10) for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_how_many_rows_are_asked_for_changes_nothing() -> None:
    small, large = (ExampleStream(range(7), encode) for _ in range(2))
    assert [i for _ in range(10) for i in ids(small, 3)] == ids(large, 30)


def test_a_restored_stream_goes_on() -> None:
    stream = ExampleStream(range(7), encode, seed=1)
    ids(stream, 17)
    other = ExampleStream(range(7), encode, seed=1)
    other.restore(stream.state())
    assert ids(other, 20) == ids(stream, 20)


def test_an_example_is_encoded_once() -> None:
    calls: Counter[int] = Counter()

    def counting(number: int) -> Encoded:
        calls[number] += 1
        return encode(number)

    ExampleStream(range(4), counting).next(20)
    assert set(calls.values()) == {1}


def test_words_of_the_errors() -> None:
    with pytest.raises(DataError, match="the training split is empty"):
        ExampleStream([], encode)
    with pytest.raises(DataError, match="saved with 7 training examples, now there are 8: restore the data"):
        ExampleStream(range(8), encode).restore({"position": 3, "examples": 7})
