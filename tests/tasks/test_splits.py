"""Seeded choices: balanced, reproducible, and nothing leaks."""

import re
from collections import Counter
from dataclasses import replace

import pytest

from incipit.errors import DataError
from incipit.tasks.example import Example
from incipit.tasks.splits import Demonstrated, carve, k_shots, shuffled, subset

WORDS = ("bad", "good")


def examples(n: int) -> list[Example]:
    """x0 bad, x1 good, x2 bad, ..."""
    return [Example(f"x{i}", WORDS[i % 2], WORDS, i % 2, (WORDS[i % 2],)) for i in range(n)]


def test_carve_takes_its_shares_and_keeps_the_order() -> None:
    rows = examples(20)
    sides = carve(rows, {"test": 0.2, "validation": 0.1}, seed=0)
    assert {name: len(side) for name, side in sides.items()} == {"test": 4, "validation": 2, "train": 14}
    assert sorted(e.input for side in sides.values() for e in side) == sorted(e.input for e in rows)
    assert [int(e.input[1:]) for e in sides["train"]] == sorted(int(e.input[1:]) for e in sides["train"])
    assert carve(rows, {"test": 0.2, "validation": 0.1}, seed=0) == sides
    assert carve(rows, {"test": 0.2, "validation": 0.1}, seed=1) != sides


def test_equal_inputs_stay_on_one_side() -> None:
    rows = examples(10) * 3
    sides = carve(rows, {"validation": 0.3}, seed=0)
    assert not {e.input for e in sides["train"]} & {e.input for e in sides["validation"]}
    assert len(sides["validation"]) == 9


def test_carve_leaves_no_side_empty() -> None:
    assert len(carve(examples(3), {"validation": 0.01}, seed=0)["validation"]) == 1
    message = "from 1 examples (1 distinct inputs) leaves none for train; name a validation source instead"
    with pytest.raises(DataError, match=re.escape(message)):
        carve(examples(1), {"validation": 0.5}, seed=0)


def test_shots_are_balanced_and_seeded() -> None:
    rows = examples(20)
    chosen = k_shots(rows, 3, seed=0, words=WORDS)
    assert Counter(e.target for e in chosen) == {"bad": 3, "good": 3}
    assert k_shots(rows, 3, seed=0, words=WORDS) == chosen
    assert k_shots(rows, 3, seed=1, words=WORDS) != chosen
    assert len(k_shots(rows, 3, seed=0)) == 3


def test_too_few_shots() -> None:
    with pytest.raises(
        DataError, match="shots = 3, but class 'good' has 2 examples; lower shots or add data"
    ):
        k_shots(examples(5), 3, seed=0, words=WORDS)
    with pytest.raises(DataError, match="shots = 6, but train has 5 examples"):
        k_shots(examples(5), 6, seed=0)


def test_subset() -> None:
    rows = examples(10)
    assert subset(rows, 10, seed=0) == rows
    assert len(subset(rows, 4, seed=0)) == 4
    assert subset(rows, 4, seed=0) == subset(rows, 4, seed=0) != subset(rows, 4, seed=1)


def grouped() -> list[Example]:
    """Questions q0 (1 candidate answer), q1 (2), q2 (3), q3 (4): 10 examples."""
    return [
        Example(f"q{n} a{i}", "bad", WORDS, 0, ("bad",), group=f"q{n}")
        for n in range(4)
        for i in range(n + 1)
    ]


def test_the_examples_of_one_question_stay_together() -> None:
    rows = grouped()
    for seed in range(5):
        sides = carve(rows, {"validation": 0.3}, seed=seed)
        assert not {e.group for e in sides["train"]} & {e.group for e in sides["validation"]}
        kept = subset(rows, 6, seed=seed)
        assert len(kept) <= 6 and all(
            sum(e.group == g for e in kept) == int(g[1:]) + 1 for g in {e.group for e in kept}
        )
    assert subset(rows, 9, seed=0) != subset(rows, 9, seed=1) and subset(rows, 10, seed=0) == rows
    with pytest.raises(DataError, match="limit = 2 is less than any question has examples \\(3 or more\\)"):
        subset([e for e in rows if e.group in ("q2", "q3")], 2, seed=0)


def test_demonstrations_stand_before_the_input() -> None:
    test = [Example("new", "good", WORDS, 1)]
    shown = Demonstrated(test, examples(10), k=4, seed=0, words=WORDS)[0]
    *worked, own = shown.input.split("\n\n")
    assert own == "new"
    assert Counter(line.split()[1] for line in worked) == {"bad": 2, "good": 2}
    assert (shown.target, shown.choice) == ("good", 1)
    assert shown.input[shown.worked :] == "new" and shown.canonical() == replace(shown, worked=0).canonical()


def test_an_example_is_never_among_its_own_demonstrations() -> None:
    rows = examples(6)
    for example, shown in zip(rows, Demonstrated(rows, rows, k=4, seed=0, words=WORDS), strict=True):
        *worked, own = shown.input.split("\n\n")
        assert own == example.input
        assert example.input not in {line.split()[0] for line in worked}
        assert Counter(line.split()[1] for line in worked) == {"bad": 2, "good": 2}
        assert len(set(worked)) == 4


def test_demonstrations_keep_the_gap_of_the_template() -> None:
    pool = [Example("Q\n", "a"), Example("Q2\n", "b")]
    assert Demonstrated([Example("R\n", "c")], pool, k=1, seed=0)[0].input in ("Q\na\n\nR\n", "Q2\nb\n\nR\n")


def test_a_slice_of_demonstrated_examples() -> None:
    rows = examples(6)
    shown = Demonstrated(rows, rows, k=2, seed=0, words=WORDS)
    assert list(shown[1:3]) == [shown[1], shown[2]]
    assert len(shown) == 6


def test_too_few_to_demonstrate() -> None:
    message = (
        "demonstrations = 4 takes 2 of class 'bad', which has 2 examples, and one must remain to stand in"
    )
    with pytest.raises(DataError, match=message):
        Demonstrated(examples(5)[1:], examples(5)[1:], k=4, seed=0, words=WORDS)


def test_a_class_that_is_not_shown_may_be_empty() -> None:
    words = (*WORDS, "awful")  # no example is awful
    seeds = [s for s in range(9) if _shows(words, s)]
    assert seeds and len(seeds) < 9  # where awful is drawn it must be told


def _shows(words: tuple[str, ...], seed: int) -> bool:
    try:
        shown = Demonstrated([Example("new", "good", words, 1)], examples(10), k=2, seed=seed, words=words)[0]
    except DataError as error:
        assert "takes 1 of class 'awful', which has 0 examples" in str(error)
        return False
    return sorted(line.split()[1] for line in shown.input.split("\n\n")[:2]) == ["bad", "good"]


def test_a_buffer_shuffles_all_examples_once() -> None:
    rows = examples(50)
    first = list(shuffled(rows, seed=0, epoch=0, buffer=8))
    assert sorted(e.input for e in first) == sorted(e.input for e in rows)
    assert first != rows
    assert list(shuffled(rows, seed=0, epoch=0, buffer=8)) == first
    assert list(shuffled(rows, seed=0, epoch=1, buffer=8)) != first
    assert {e.input for e in first[:1]} <= {
        f"x{i}" for i in range(8)
    }  # the first comes from the first buffer
