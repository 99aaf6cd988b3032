"""Labels match by their text, whatever the file format made of them."""

import re

import pytest

from incipit.errors import DataError
from incipit.tasks.labels import Labels

DIGITS = Labels.of({"0": "negative", "1": "positive"})
TRUTH = Labels.of({"true": "yes", "false": "no"})


@pytest.mark.parametrize(
    ("labels", "raw", "index"),
    [
        (DIGITS, 0, 0),
        (DIGITS, "0", 0),
        (DIGITS, 1.0, 1),
        (DIGITS, "1.0", 1),
        (DIGITS, " 1 ", 1),
        (DIGITS, True, 1),
        (TRUTH, True, 0),
        (TRUTH, "True", 0),
        (TRUTH, "FALSE", 1),
        (Labels.of({"True": "yes", "False": "no"}), True, 0),
        (Labels.of({"True": "yes", "False": "no"}), "false", 1),
        (Labels.of({"0.5": "half", "1": "whole"}), 0.5, 0),
        (Labels.of(["negative", "positive"]), "positive", 1),
        (Labels.of(["negative", "positive"]), 1, 1),
        (Labels.of(["no", "yes"]), True, 1),
        (Labels.of(["1", "2", "3"]), 1, 0),
        (Labels.of({"1": "bad", "2": "bad", "3": "good"}), 3, 1),
    ],
)
def test_index(labels: Labels, raw: object, index: int) -> None:
    assert labels.index(raw) == index


def test_two_raw_values_may_share_a_word() -> None:
    assert Labels.of({"1": "bad", "2": "bad", "3": "good"}).words == ("bad", "good")


@pytest.mark.parametrize(
    ("labels", "raw", "message"),
    [
        (
            Labels.of(["negative", "positive"]),
            "postive",
            "holds 'postive', which is no label; did you mean 'positive'",
        ),
        (Labels.of(["1", "2", "3"]), 0, "field 'label' holds 0, which is no label; known: 1, 2, 3"),
        (
            DIGITS,
            2,
            "field 'label' holds 2, which is no label; known: 0, 1; mend the record or add it to labels",
        ),
        (DIGITS, -1, "holds -1, which is no label"),
        (DIGITS, float("nan"), "field 'label' is NaN; label the record or remove it"),
        (DIGITS, None, "field 'label' is null; label the record"),
        (DIGITS, " ", "field 'label' is empty; label the record"),
        (DIGITS, [0], "field 'label' is a list; a label is text, a number, or true or false"),
    ],
)
def test_a_bad_label_names_the_nearest(labels: Labels, raw: object, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        labels.index(raw)


def test_a_word_that_is_a_number_is_never_an_index() -> None:
    halves = Labels.of(["0.0", "0.5", "1.0"])
    assert [halves.index(raw) for raw in (0.0, 0.5, 1.0, "1.0")] == [0, 1, 2, 2]
    for raw in (1, "1", 2):  # 1 is no index: it would be 0.5
        with pytest.raises(DataError, match="which is no label"):
            halves.index(raw)
