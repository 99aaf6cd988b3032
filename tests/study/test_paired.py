"""Paired runs: results out of records, the exact test, the page and its verdicts."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from incipit import files
from incipit.errors import DataError, RecipeError
from incipit.study import comparison, report
from incipit.study.paired import Paired, flipped, overlap, rank_correlation

PROVENANCE = {
    "commit": "0" * 40,
    "dirty": False,
    "versions": {"incipit": "1"},
    "machine": {"cores": 1},
    "time": "1",
}


def row(cell: str, seed: int, score: float, time: str = "1", **extra: Any) -> dict[str, Any]:
    at, _, method = cell.rpartition("/")
    return {
        "name": at, "seed": seed, "scores": {}, "settings": {"cell": at},
        "data": {"task": "d"}, "backbone": {"name": "toy", "parameters": 10}, "seconds": 3.0, "parameters": 0,
        "extra": {"methods": {method: {"score": score, **extra}}}, "provenance": PROVENANCE | {"time": time},
    }  # fmt: skip


def pruned(task: str, seed: int, tokens: Sequence[float], **tests: float) -> dict[str, Any]:
    made = row("", seed, 0.0)
    made["name"], made["settings"] = f"{task}-{seed}", {"task": {"name": task}}
    made["extra"] = {
        "rows": [{"name": name.replace("_", " "), "test": {"accuracy": s}} for name, s in tests.items()]
        + [{"name": "tokens 0.1", "test": {}}],
        "scores": {"tokens": list(tokens)}, "pruned": {"kept": 3, "numbers": 4},
        "cost": {s: {"of_plain": 0.5} for s in ("scores", "tokens", "pieces")},
    }  # fmt: skip
    return made


def by_hand(differences: Sequence[float]) -> float:
    """All sign choices, one after another."""
    seen = abs(sum(differences))
    signs = list(product((1, -1), repeat=len(differences)))
    sums = [abs(sum(s * d for s, d in zip(one, differences, strict=True))) for one in signs]
    return sum(total >= seen - 1e-9 for total in sums) / len(sums)


@pytest.mark.parametrize(
    "differences",
    [
        [0.1],
        [0.1, 0.2, 0.3],
        [0.1, -0.1],
        [0.0, 0.0],
        [1 / 160, -3 / 160, 7 / 160, 0.0],
        [1 / 3, 1 / 7, -1 / 120],
    ],
)
def test_the_exact_test_is_all_sign_choices(differences: list[float]) -> None:
    assert flipped(differences) == pytest.approx(by_hand(differences))


def test_the_exact_test_of_many_pairs_is_quick_and_of_none_is_one() -> None:
    assert flipped([]) == 1.0
    assert flipped([1 / 120] * 60) == pytest.approx(2 / 2**60)
    odd = [0.123456789, -0.987654321, 0.5550001, 0.1]  # no common unit: told apart by hundredths of a point
    assert flipped(odd) == pytest.approx(by_hand([round(d, 4) for d in odd]))


def test_ranks_and_overlap() -> None:
    assert rank_correlation([1, 2, 3], [2, 4, 9]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [9, 4, 2]) == pytest.approx(-1.0)
    assert rank_correlation([1, 1, 1], [9, 4, 2]) == 0.0
    assert rank_correlation([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(
        4.5 / (4.5 * 5) ** 0.5
    )  # a tie has its mean
    seen, chance = overlap([[4, 3, 2, 1], [4, 1, 3, 2], [1, 2, 3, 4]])  # {0, 1}, {0, 2}, {2, 3}
    assert seen == pytest.approx((1 / 3 + 0 + 1 / 3) / 3) and chance == pytest.approx(1 / 3)


def test_results_of_both_kinds_of_record() -> None:
    rows = [
        pruned("sst2", 0, [2, 1], pruned=0.75, as_it_came=0.5),
        row("cr/8/mix", 1, 0.5, controls={"sesom": 0.5, "entropy": 1.0, "uniform": 0.25}),
        row("cr/8/mix", 1, 0.6, time="2"),
    ]
    paired = Paired.of(rows[::-1])
    assert paired.differences("pruned", "as it came") == [0.25]
    assert paired.scores("mix", ["8"]) == {(("cr", "8"), 1): 0.6}, "the newer one counts"
    assert paired.scores("mix", ["16"]) == {} and paired.scores("mix: uniform") == {(("cr", "8"), 1): 0.25}
    assert set(paired.by) == {"pruned", "as it came", "mix", "mix: uniform"}
    numbers = Paired.of([row(f"t/{n}/m", 0, 0.5) for n in (16, 8, 32)])
    assert numbers.places == [("t", "8"), ("t", "16"), ("t", "32")]


STORY = """
title = "Toy"
paper = "Nobody 2022."
[comparison]
cells = 12
[[sections]]
id = "all"
title = "All"
methods = ["good", "bad", "never"]
drawn = ["good", "bad"]
apart = ["8", "32"]
axis = "shots"
against = "good"
[[claims]]
number = 1
text = "good is better"
source = "S1"
rule = "greater"
left = "good"
right = "bad"
[[claims]]
number = 2
text = "bad is better"
rule = "greater"
left = "bad"
right = ["good"]
[[claims]]
number = 3
text = "good is better than itself, and than bad"
rule = "greater"
left = "good"
right = ["good", "bad"]
[[claims]]
number = 4
text = "the lead shrinks"
rule = "shrinks"
left = "good"
right = "bad"
labels = ["8", "32"]
[[claims]]
number = 5
text = "what is better weighs more"
rule = "correlates"
left = "good"
right = "bad"
numbers = ["weights", "each"]
what = "rho"
[[claims]]
number = 6
text = "nobody tried"
note = "too dear"
[[claims]]
number = 7
text = "never"
rule = "greater"
left = "never"
right = "bad"
"""


def study(folder: Path, story: str = STORY) -> Path:
    files.atomic_write(folder / "study.toml", story)
    return folder


def rows() -> list[dict[str, Any]]:
    found = []
    for seed in range(6):
        for shots, lead in ((8, 0.2), (32, 0.1)):
            found.append(row(f"t/{shots}/good", seed, 0.5 + lead + seed / 100, weights=[0.1, 0.2, 0.7]))
            found.append(row(f"t/{shots}/bad", seed, 0.5 + seed / 100, each=[0.3, 0.4, 0.5]))
    return found


def test_the_page_and_its_verdicts(tmp_path: Path) -> None:
    folder = study(tmp_path / "toy")
    assert comparison.is_comparison(folder)
    made = comparison.build(folder, rows())
    verdicts = {claim.number: claim.verdict for claim in made.claims}
    unseen, none = "not visible here", "not run"
    assert verdicts == {1: "holds", 2: "fails", 3: unseen, 4: "holds", 5: "holds", 6: none, 7: none}
    assert made.claims[0].evidence == "good minus bad: +15.0 points over 12 cells, p < 0.001"
    assert "too dear" in made.claims[5].evidence
    html, markdown = report.write(made, tmp_path / "out")
    text = files.read_bytes(markdown).decode()
    assert "| good | 72.5 ± 1.9 | 6 |  |  |" in text and "| bad | 52.5 ± 1.9 | 6 | +20.0 | 0.031 |" in text
    assert "shots 8:" in text and "12 of 12 cells were run" in text and "| 0.02 |" in text
    assert (tmp_path / "out" / "figures" / "all.svg").exists() and b"<svg" in files.read_bytes(html)


def test_two_backbones_stand_apart(tmp_path: Path) -> None:
    """The same cells on a larger model, where the methods change places: no mean, test or claim mixes the two."""
    large = [one | {"backbone": {"name": "built:big", "parameters": 99}} for one in rows()]
    for one in large:
        ((method, found),) = one["extra"]["methods"].items()
        more = {"weights": [0.1, 0.2, 0.7], "each": [0.3, 0.4, 0.5]}
        one["extra"] = {"methods": {{"good": "bad", "bad": "good"}[method]: found | more}}
    made = comparison.build(study(tmp_path / "toy"), rows() + large)
    assert made.run == made.places == 24
    told = {(c.number, c.evidence.split(": ")[0], c.verdict) for c in made.claims if c.number < 3}
    assert told == {
        (1, "toy", "holds"),
        (2, "toy", "fails"),
        (1, "built:big", "fails"),
        (2, "built:big", "holds"),
    }
    _, markdown = report.write(made, tmp_path / "out")
    text = files.read_bytes(markdown).decode()
    assert (
        text.index("On built:big, shots 8:") < text.index("On toy, shots 8:") and text.count("## All\n") == 1
    )
    assert (
        "| 1 | good is better | S1 | toy | holds | good minus bad: +15.0 points over 12 cells, p < 0.001 |"
        in text
    )
    assert "| 1 | good is better | S1 | built:big | fails | good minus bad: -15.0 points" in text
    assert (
        text.count("| 6 | nobody tried |") == 1
        and "3 holds, 1 fails, 1 not visible here, 2 not run (toy)" in text
    )
    assert {f.name for f in (tmp_path / "out" / "figures").iterdir()} == {"all-toy.svg", "all-built-big.svg"}


def test_the_page_of_pruned_prompts(tmp_path: Path) -> None:
    story = (
        STORY.partition("[[sections]]")[0]
        + """
[[sections]]
id = "controls"
title = "Controls"
methods = ["as it came", "pruned"]
against = "pruned"
overlap = true
[[claims]]
number = 1
text = "seeds agree"
rule = "overlap"
"""
    )
    same = [pruned(t, s, [4, 3, 2, 1], pruned=0.5, as_it_came=0.25) for t in ("a", "b", "c") for s in (0, 1)]
    made = comparison.build(study(tmp_path / "toy", story), same)
    assert (made.claims[0].verdict, made.claims[0].evidence) == (
        "holds",
        "Jaccard index minus chance +0.67 ± 0.00 over 3 tasks",
    )
    text = files.read_bytes(report.write(made, tmp_path / "out")[1]).decode()
    assert "| as it came | 25.0 ± 0.0 | 25.0 ± 0.0 | 25.0 ± 0.0 | 25.0 | 6 | +25.0 | 0.031 |" in text
    assert "| a | 2 | 75, 75 | 1.00 (0.33) | 1.50 |" in text
    alone = comparison.build(study(tmp_path / "one", story), same[:1])
    assert alone.claims[0].verdict == "not run"


def test_what_a_page_needs(tmp_path: Path) -> None:
    folder = study(tmp_path / "toy")
    with pytest.raises(DataError, match="the study 'toy' has no record"):
        comparison.build(folder, [])
    wrong = study(tmp_path / "wrong", STORY.replace('rule = "shrinks"', 'rule = "shrink"'))
    with pytest.raises(RecipeError, match=r"rule 'shrink' is unknown; did you mean 'shrinks'"):
        comparison.build(wrong, rows())
