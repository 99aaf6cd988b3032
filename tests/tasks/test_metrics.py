"""Scores that a reader can count by hand."""

import math
import re
from dataclasses import replace

import pytest

from incipit.errors import DataError
from incipit.tasks.example import Example, Message
from incipit.tasks.metrics import DEFAULTS, METRICS, compute, normalise, token_f1


def labelled(*words: str, choices: tuple[str, ...] = ("no", "yes")) -> list[Example]:
    return [Example("?", w, choices, choices.index(w), (w,)) for w in words]


def texts(*references: str | tuple[str, ...]) -> list[Example]:
    tuples = [(r,) if isinstance(r, str) else r for r in references]
    return [Example("?", r[0], references=r) for r in tuples]


def score(name: str, predictions: list[str], examples: list[Example]) -> float:
    return compute([name], predictions, examples)[name]


def test_the_first_is_the_metric_and_illegal_outputs_are_wrong() -> None:
    scores = compute(
        ["accuracy", "f1_macro"], [" yes ", "no", "Yes", ""], labelled("yes", "yes", "yes", "no")
    )
    # yes: TP 1, FN 2 -> F1 1/2; no: FP 1, FN 1 -> 0
    assert list(scores.items()) == [("accuracy", 0.25), ("f1_macro", 0.25), ("legal_rate", 0.5)]


def test_f1_binary_counts_an_illegal_output_as_the_opposite() -> None:
    truth = labelled("yes", "yes", "no", "no")
    assert score("f1_binary", ["yes", "no", "yes", "no"], truth) == 0.5  # TP 1, FP 1, FN 1
    assert score("f1_binary", ["yes", "maybe", "maybe", "no"], truth) == 0.5
    assert score("f1_binary", ["no"] * 4, truth) == 0.0


def test_mcc() -> None:
    truth = labelled("yes", "yes", "no", "no")
    assert score("mcc", ["yes", "yes", "no", "no"], truth) == 1.0
    assert score("mcc", ["no", "no", "yes", "yes"], truth) == -1.0
    assert score("mcc", ["yes"] * 4, truth) == 0.0  # constant: 0, and no warning
    assert score("mcc", ["yes", "no"], labelled("yes", "yes")) == 0.0


def test_f1_macro_over_the_classes_that_occur() -> None:
    three = ("a", "b", "c")
    assert score("f1_macro", ["a", "b"], labelled("a", "b", choices=three)) == 1.0
    assert score("f1_macro", ["a", "a"], labelled("a", "b", choices=three)) == pytest.approx(
        1 / 3
    )  # 2/3 and 0
    assert score("f1_macro", ["x", "x"], labelled("a", "b", choices=three)) == 0.0


def test_multiple_choice_accuracy_with_options_per_example() -> None:
    examples = [Example("?", "x", ("x", "y"), 0), Example("?", "w", ("v", "w", "u"), 1)]
    assert compute(["accuracy"], ["x", "x"], examples) == {"accuracy": 0.5, "legal_rate": 0.5}


def test_squad_normalisation() -> None:
    assert normalise("The  Cat, an'  A-dog!") == "cat adog"
    assert score("exact_match", ["the cat.", "dog"], texts(("Cat", "Hound"), ("cat", "a Dog"))) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer", "f1"),
    [
        ("the red cat", "a red dog", 0.5),
        ("x x y", "x", 0.5),
        ("cat", "dog", 0.0),
        ("the", "a", 1.0),
        ("", "x", 0.0),
    ],
)
def test_token_f1(prediction: str, answer: str, f1: float) -> None:
    assert token_f1(prediction, answer) == f1


def test_f1_takes_the_best_reference() -> None:
    assert score("f1", ["red cat"], texts(("dog", "red cat sat here"))) == pytest.approx(4 / 6)


def test_correlations() -> None:
    truth = texts("1", "2", "3")
    assert score("pearson", ["2", "4", "6.0"], truth) == pytest.approx(1.0)
    assert score("pearson", ["1", "3", "2"], truth) == pytest.approx(0.5)
    assert score("spearman", ["1", "10", "100"], truth) == pytest.approx(1.0)
    assert score("spearman", ["3", "2", "1"], truth) == pytest.approx(-1.0)
    assert compute(["pearson", "spearman"], ["5", "5", "5"], truth) == {
        "pearson": 0.0,
        "spearman": 0.0,
        "legal_rate": 1.0,
    }


def test_an_output_that_is_no_number_is_as_wrong_as_the_range_allows() -> None:
    scores = compute(["pearson"], ["1", "nan", "three"], texts("1", "2", "3"))  # read as 1, 3, 1
    assert scores == {"pearson": pytest.approx(0.0), "legal_rate": pytest.approx(1 / 3)}


def test_rouge() -> None:
    truth = texts("the cat sat")
    assert score("rouge1", ["sat the cat"], truth) == 1.0
    assert score("rouge2", ["sat the cat"], truth) == 0.5  # "the cat" of two bigrams
    assert score("rougeL", ["sat the cat"], truth) == pytest.approx(2 / 3)
    assert score("rougeL", ["sat the cat"], texts(("a dog", "sat the cat"))) == 1.0


def test_bleu() -> None:
    assert (
        score("bleu", ["the cat sat on the mat", "a b c d"], texts("the cat sat on the mat", "a b c d"))
        == 1.0
    )
    # precisions 3/4, 2/3, 1/2 and, smoothed, 1/2
    assert score("bleu", ["a b c x"], texts(("z", "a b c d"))) == pytest.approx(
        (3 / 4 * 2 / 3 / 2 / 2) ** 0.25
    )


def test_perplexity() -> None:
    one = texts("x", "y")
    assert compute(["perplexity"], [], one, nll=math.log(8), count=3) == {"perplexity": pytest.approx(2.0)}
    assert compute(["perplexity"], [], one, nll=[math.log(2), math.log(4)], count=[1, 2]) == {
        "perplexity": pytest.approx(2.0)
    }
    assert compute(["perplexity"], [], one, nll=1e6, count=1)["perplexity"] == math.inf


def test_a_chat_is_scored_against_its_last_turn() -> None:
    chat = Example("", "", messages=(Message("user", "hi"), Message("assistant", "Hello there")))
    assert score("exact_match", ["hello there"], [chat]) == 1.0


@pytest.mark.parametrize(
    ("names", "predictions", "examples", "message"),
    [
        (["acuracy"], ["x"], texts("x"), "metric 'acuracy' is unknown; did you mean 'accuracy'?"),
        (["accuracy"], ["x"], texts("x", "y"), "1 predictions for 2 examples; give one each, in order"),
        (["accuracy"], [], [], "1 metrics over 0 examples: nothing to score"),
        ([], ["x"], texts("x"), "0 metrics over 1 examples: nothing to score"),
        (["mcc"], ["x"], texts("x"), "f1_binary, f1_macro and mcc need label words"),
        (["pearson"], ["1"], texts("one"), "target 'one' is no number; choose another metric"),
        (
            ["exact_match_by_group"],
            ["yes"],
            labelled("yes"),
            "an example is in no group: exact_match_by_group needs",
        ),
        (["perplexity"], [], texts("x"), "perplexity needs the summed nll and the count of target tokens"),
    ],
)
def test_what_cannot_be_scored(
    names: list[str], predictions: list[str], examples: list[Example], message: str
) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        compute(names, predictions, examples)


def test_defaults_fit_their_kinds() -> None:
    assert all(kind in METRICS[name].kinds for kind, names in DEFAULTS.items() for name in names)


def test_ranges_and_directions() -> None:
    assert [n for n, m in METRICS.items() if not m.higher_is_better] == ["perplexity"]
    assert {n for n, m in METRICS.items() if m.range == (-1.0, 1.0)} == {"mcc", "pearson", "spearman"}


def test_exact_match_counts_groups_and_not_examples() -> None:
    rows = [
        replace(e, group=g) for e, g in zip(labelled("yes", "no", "yes", "no", "no"), "aabcc", strict=True)
    ]
    told = ["yes", "no", "no", "no", "maybe"]  # a is all right, b is wrong, c has an illegal answer
    assert score("exact_match_by_group", told, rows) == pytest.approx(1 / 3)
    assert score("exact_match_by_group", ["yes", "no", "yes", "no", "no"], rows) == 1.0


def test_a_phrase_that_names_nothing_is_wrong_whatever_the_label() -> None:
    rows = [Example("?", "the old man", choice=label, references=("the old man",)) for label in (1, 0)]
    assert score("referent_accuracy", ["old  man", "Ann"], rows) == 1.0
    assert score("referent_accuracy", ["the", "the"], rows) == 0.0  # as T5: no words are left
    assert score("referent_accuracy", [" ", "His"], rows) == 0.0
