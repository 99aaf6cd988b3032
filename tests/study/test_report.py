"""The report: rules judge made-up records as a reader would by hand, and the page says what the records say."""

import random
import re
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from incipit import files
from incipit.cli import main
from incipit.errors import DataError, RecipeError
from incipit.study import Study, claims, report
from incipit.study.points import Points, estimate, mean_of

Scores = dict[str, list[float]]


def made(
    study: Study, experiment: str, numbers: dict[tuple[str, ...], list[float]], **extra: Any
) -> list[dict[str, Any]]:
    """Rows of the points of an experiment whose coordinates begin as the keys do."""
    found = []
    for place in study.places([experiment]):
        for key, values in numbers.items():
            if set(key) <= set(place.coordinates.values()):
                found += [row(place.cell, seed, value, **extra) for seed, value in enumerate(values)]
    return found


def row(
    cell: Any, seed: int, value: float, time: str = "2026-01-01", data: str = "d", **extra: Any
) -> dict[str, Any]:
    scores = {"test": {"accuracy": value, "legal_rate": 1.0}} | {
        k: {"accuracy": v} for k, v in extra.pop("more", {}).items()
    }
    return {
        "name": cell.name,
        "seed": seed,
        "scores": scores,
        "settings": {"cell": cell.key},
        "data": {"task": data},
        "backbone": {"name": cell.backbone, "fingerprint": {"weights": "w"}, "parameters": 1000},
        "seconds": 2.0,
        "parameters": 64,
        "extra": {"bytes": 256, **extra},
        "provenance": {
            "commit": "0123456789abcdef",
            "dirty": False,
            "versions": {"torch": "2"},
            "machine": {"cores": 2},
            "time": time,
        },
    }


def verdict(points: Points, **claim: Any) -> tuple[str, str]:
    (found,) = claims.judge([{"number": 1, "text": "t", **claim}], points)
    return found.verdict, found.evidence


@pytest.mark.parametrize(
    ("prompt", "few", "wanted"),
    [
        ([0.8, 0.82], [0.6, 0.62], "holds"),
        ([0.6, 0.62], [0.8, 0.82], "fails"),
        ([0.5, 0.9], [0.6, 0.7], "not visible here"),
        ([0.9], [0.1], "not visible here"),  # one seed says nothing of the spread
        ([0.7, 0.74], [0.61, 0.65], "not visible here"),  # 9.0 ± 2.8: of two seeds a side 4.30 errors
    ],
)
def test_greater(study: Path, prompt: list[float], few: list[float], wanted: str) -> None:
    plan = Study.read("toy")
    points = Points.of(plan, made(plan, "size", {("prompt", "one"): prompt, ("few-shot", "one"): few}))
    rule = {
        "rule": "greater",
        "experiment": "size",
        "left": {"method": "prompt"},
        "right": {"method": "few-shot"},
    }
    assert verdict(points, **rule)[0] == wanted
    if wanted == "holds":  # means .81 and .61; each error is sqrt(.0002 / 2) = .01
        assert (
            verdict(points, **rule)[1]
            == "prompt (81.0) minus few-shot (61.0): +20.0 ± 1.4 points over 1 pair(s) of settings, above in 1"
        )
    assert verdict(Points.of(plan, []), **rule) == ("not run", "no records")


@pytest.mark.parametrize(
    ("gaps", "wanted"), [((0.3, 0.1), "holds"), ((0.1, 0.3), "fails"), ((0.2, 0.2), "not visible here")]
)
def test_the_gap_shrinks(study: Path, gaps: tuple[float, float], wanted: str) -> None:
    plan = Study.read("toy")
    numbers = {}
    for size, gap in zip(("one", "two"), gaps, strict=True):
        numbers[("model", size)] = [0.8, 0.82]
        numbers[("prompt", size)] = [0.8 - gap, 0.82 - gap]
    rule = {
        "rule": "gap_shrinks",
        "experiment": "size",
        "left": {"method": "model"},
        "right": {"method": "prompt"},
    }
    found = verdict(Points.of(plan, made(plan, "size", numbers)), along="size", **rule)
    told = ", ".join(
        f"{n} {100 * gap:+.1f} (81.0, {81 - 100 * gap:.1f})"
        for n, gap in zip(("one", "two"), gaps, strict=True)
    )
    assert found[0] == wanted and f"model minus prompt by size: {told}; first minus last" in found[1]


def test_a_gap_that_opens_contradicts_and_one_that_was_never_there_shows_nothing(study: Path) -> None:
    plan = Study.read("toy")
    rule = {"rule": "gap_shrinks", "experiment": "size", "along": "size"}
    sides = {"left": {"method": "model"}, "right": {"method": "prompt"}}

    def told(one: float, two: float) -> tuple[str, str]:
        numbers = {("model", "one"): [0.8, 0.82], ("model", "two"): [0.8, 0.82]}
        numbers |= {("prompt", "one"): [one, one + 0.02], ("prompt", "two"): [two, two + 0.02]}
        return verdict(Points.of(plan, made(plan, "size", numbers)), **rule, **sides)

    assert told(0.8, 0.5)[0] == "fails"
    assert told(0.8, 0.95)[0] == "not visible here"  # the prompt passes by, from no gap
    one = made(plan, "size", {("model", "one"): [0.8, 0.82], ("prompt", "one"): [0.5, 0.52]})
    assert verdict(Points.of(plan, one), **rule, **sides) == (
        "not run",
        "fewer than two labels of size were run",
    )


@pytest.mark.parametrize(
    ("rule", "two", "four", "wanted"),
    [
        ({"rule": "ordered", "along": "length"}, [0.5, 0.52], [0.8, 0.82], "holds"),
        ({"rule": "ordered", "along": "length"}, [0.8, 0.82], [0.5, 0.52], "fails"),
        ({"rule": "saturates", "along": "length", "steps": ["2", "4", "4"]}, [0.5, 0.52], [0.8, 0.82], "holds"),
        ({"rule": "saturates", "along": "length", "steps": ["2", "2", "4"]}, [0.5, 0.52], [0.8, 0.82],
         "not visible here"),
        ({"rule": "saturates", "along": "length", "steps": ["2", "4", "4"]}, [0.8, 0.82], [0.5, 0.52], "fails"),
        ({"rule": "saturates", "along": "length", "steps": ["2", "4", "2"]}, [0.5, 0.52], [0.8, 0.82], "fails"),
        ({"rule": "ordered", "along": "length", "strict": True}, [0.5, 0.52], [0.8, 0.82], "holds"),
        ({"rule": "no_worse", "left": {"length": "2"}, "right": {"length": "4"}, "margin": 0.02},
         [0.5, 0.501], [0.505, 0.504], "holds"),
        ({"rule": "no_worse", "left": {"length": "2"}, "right": {"length": "4"}, "margin": 0.02},
         [0.4, 0.401], [0.505, 0.504], "fails"),
        ({"rule": "no_worse", "left": {"length": "2"}, "right": {"length": "4"}, "margin": 0.02},
         [0.4, 0.6], [0.5, 0.5], "not visible here"),
        ({"rule": "equal", "left": {"length": "2"}, "right": {"length": "4"}}, [0.5, 0.501], [0.505, 0.504], "holds"),
        ({"rule": "equal", "left": {"length": "2"}, "right": {"length": "4"}}, [0.5, 0.501], [0.6, 0.601], "fails"),
        ({"rule": "equal", "left": {"length": "2"}, "right": {"length": "4"}, "margin": 0.03},
         [0.5, 0.51], [0.54, 0.55], "not visible here"),  # 4.0 ± 0.7, not within 3 and not surely beyond
        ({"rule": "steady"}, [0.5, 0.51], [0.8, 0.81], "holds"),
        ({"rule": "steady"}, [0.5, 0.9], [0.5, 0.9], "fails"),
        ({"rule": "steady", "along": "length"}, [0.5, 0.51], [0.8, 0.81], "holds"),
        ({"rule": "steady", "along": "method"}, [0.5, 0.51], [0.8, 0.81], "not run"),  # one method a length
        ({"rule": "steady"}, [0.5, 0.6], [0.6, 0.7], "fails"),  # the settings differ by no more than the seeds make
        ({"rule": "within", "what": "test", "at_least": 0.5}, [0.6, 0.62], [0.6, 0.6], "holds"),
        ({"rule": "within", "what": "test", "at_most": 0.5}, [0.6, 0.62], [0.6, 0.6], "fails"),
        ({"rule": "within", "what": "test", "at_least": 0.5}, [0.5, 0.7], [0.6, 0.6], "not visible here"),
        ({"rule": "within", "what": "test", "at_least": 0.5, "exact": True}, [0.5, 0.7], [0.6, 0.6], "holds"),
        ({"rule": "within", "what": "test", "at_least": 0.5, "exact": True}, [0.49, 0.9], [0.9, 0.9], "fails"),
        ({"rule": "above", "what": "test", "than": "extra.random"}, [0.5, 0.52], [0.6, 0.6], "holds"),
        ({"rule": "above", "what": "test", "than": "extra.random"}, [0.1, 0.12], [0.1, 0.1], "fails"),
        ({"rule": "above", "what": "test", "than": "extra.random"}, [0.2, 0.7], [0.3, 0.31], "not visible here"),
        ({"rule": "above", "what": "test", "than": "extra.random", "along": "length"}, [0.5, 0.52], [0.3, 0.32],
         "not visible here"),  # of one length only
        ({"rule": "ratio", "what": "test", "left": {"length": "2"}, "right": {"length": "4"}, "at_most": 0.5},
         [0.1, 0.1], [0.4, 0.4], "holds"),
    ],
)  # fmt: skip
def test_the_other_rules(
    study: Path, rule: dict[str, Any], two: list[float], four: list[float], wanted: str
) -> None:
    plan = Study.read("toy")
    points = Points.of(plan, made(plan, "length", {("2",): two, ("4",): four}, random=0.3))
    assert verdict(points, experiment="length", **rule)[0] == wanted
    assert verdict(Points.of(plan, []), experiment="length", **rule)[0] == "not run"


def test_an_axis_is_judged_over_the_settings_that_every_label_has(study: Path) -> None:
    plan = Study.read("toy")
    rows = made(plan, "size", {("prompt", "one"): [0.7, 0.71], ("prompt", "two"): [0.8, 0.81]})
    rule = {"rule": "ordered", "experiment": "size", "along": "size", "labels": ["one", "two"]}
    wanted = ("holds", "one: 70.5 ± 0.5, two: 80.5 ± 0.5; last minus first +10.0 ± 0.7 points")
    assert verdict(Points.of(plan, rows), **rule) == wanted
    rows += made(
        plan, "size", {("model", "one"): [0.1, 0.11]}
    )  # of the other size there is none: it is left out
    assert verdict(Points.of(plan, rows), **rule) == wanted
    assert verdict(Points.of(plan, rows[-2:]), **rule) == ("not run", "not every setting was run")


def test_away_from_home(study: Path) -> None:
    plan = Study.read("toy")
    rows = made(plan, "size", {("prompt", "one"): [0.7, 0.71]}, more={"shift:far": 0.6})
    rows += made(plan, "size", {("model", "one"): [0.8, 0.81]}, more={"shift:far": 0.4})
    rule = {
        "rule": "shifted",
        "experiment": "size",
        "left": {"method": "prompt"},
        "right": {"method": "model"},
    }
    found = verdict(Points.of(plan, rows), **rule)
    assert found[0] == "holds" and "+20.0" in found[1] and "in its own domain -10.0 ± 0.7" in found[1]
    found = verdict(Points.of(plan, rows), matched=0.02, **rule)
    assert found[0] == "not visible here" and found[1].endswith("not matched there (margin 2.0)")


def test_many_tests_of_one_seed_are_one_number(study: Path) -> None:
    """Five tests that say the same of both seeds are no surer than one: 60 against 50, 10 +- 10 points."""
    plan = Study.read("toy")
    rows = made(plan, "size", {("prompt", "one"): [0.7, 0.71], ("model", "one"): [0.7, 0.71]})
    for row, far in zip(rows, (0.5, 0.7, 0.5, 0.5), strict=True):
        row["scores"] = {**row["scores"], **{f"shift:{n}": {"accuracy": far} for n in range(5)}}
    rule = {"rule": "shifted", "experiment": "size"}
    sides = {"left": {"method": "prompt"}, "right": {"method": "model"}}
    told, evidence = verdict(Points.of(plan, rows), **rule, **sides)
    assert told == "not visible here"
    assert "elsewhere: +10.0 ± 10.0 points over 1 pair(s) of settings, above in 5 of 5" in evidence


def test_claims_that_cannot_be_judged(study: Path) -> None:
    points = Points.of(Study.read("toy"), [])
    assert verdict(points, note="no such thing") == ("not run", "no such thing")
    assert verdict(points, rule="greater", experiment="other")[1] == "this scale has no experiment 'other'"
    with pytest.raises(RecipeError, match="claim 1: rule 'greatr' is unknown; did you mean 'greater'"):
        verdict(points, rule="greatr", experiment="size")


def test_a_scale_may_judge_otherwise(study: Path) -> None:
    points = Points.of(Study.read("toy"), [])
    claim = {
        "number": 1,
        "text": "t",
        "rule": "within",
        "experiment": "other",
        "big": {"experiment": "length"},
        "what": "test",
    }
    assert claims.judge([claim], points, "big")[0].evidence == "no records"


def test_only_rows_of_these_settings_and_the_newest_data(study: Path) -> None:
    plan = Study.read("toy")
    old = made(plan, "length", {("2",): [0.1, 0.1], ("4",): [0.2, 0.2]}, data="old", time="2025")
    new = made(plan, "length", {("2",): [0.7, 0.8]}, time="2026")
    other = [{**new[0], "settings": {"cell": "of another recipe"}}]
    points = Points.of(plan, [*new, *old, *other])
    assert points.aside == {"other settings": 1, "other data": 4}
    assert points.values("length", {}) == {("toy", "one", "prompt", "2"): [0.7, 0.8]}
    elsewhere = [{**r, "backbone": {**r["backbone"], "fingerprint": {"weights": "x"}}} for r in new]
    later = [{**r, "provenance": {**r["provenance"], "time": "2027"}} for r in elsewhere]
    assert Points.of(plan, [*new, *later]).aside == {"another backbone": 2}


def test_means_and_errors() -> None:
    assert mean_of([[0.0, 1.0], [1.0]]) == 0.75  # each setting counts once
    found = estimate(
        (1.0, [[0.0, 1.0], [0.0, 1.0]])
    )  # s² / n = .25 each; two groups of one degree of freedom: t = 4.30
    assert found.error == pytest.approx((2 * 0.25) ** 0.5 / 2)
    assert found.reach == pytest.approx(4.30 * found.error)
    assert estimate((1.0, [[1.0]])).error == float("inf")
    three = [[0.0, 0.1, 0.2]]
    assert estimate((1.0, three), (-1.0, three)).reach == pytest.approx(2.78 * (2 * 0.01 / 3) ** 0.5)
    assert estimate((1.0, three), (-1.0, [[0.1, 0.1, 0.1]])).reach == pytest.approx(
        4.30 * (0.01 / 3) ** 0.5
    )  # one side
    assert not estimate((1.0, [[0.1, 0.1]]), (-1.0, [[0.1, 0.1]])).seen
    assert estimate((1.0, [[0.2, 0.2]]), (-1.0, [[0.1, 0.1]])).seen  # nothing spreads


def test_an_interval_covers_what_is_not_there() -> None:
    """Of 2,000 differences of nothing, three seeds a side, some 5 % are seen; of twice the error 12 % would be."""
    draw = random.Random(0)
    pairs = [[[draw.gauss(0, 1) for _ in range(3)] for _ in range(2)] for _ in range(2000)]
    found = [estimate((1.0, [one]), (-1.0, [other])) for one, other in pairs]
    assert 0.02 < statistics.fmean(f.seen for f in found) < 0.055
    assert 0.08 < statistics.fmean(abs(f.value) > 2 * f.error for f in found) < 0.14


def test_a_claim_of_several_statements(study: Path) -> None:
    plan = Study.read("toy")
    rows = made(plan, "length", {("2",): [0.5, 0.52], ("4",): [0.8, 0.82]})
    points = Points.of(plan, rows)
    rise = {"says": "rises", "rule": "ordered", "experiment": "length", "along": "length"}
    high = {"says": "high", "rule": "within", "experiment": "length", "what": "test", "at_least": 0.9}
    gap = {"says": "gap", "rule": "greater", "experiment": "size", "left": {"method": "prompt"},
           "right": {"method": "model"}}  # fmt: skip
    assert verdict(points, parts=[rise]) == (
        "holds",
        "rises: holds (2: 51.0 ± 1.0, 4: 81.0 ± 1.0; last minus first +30.0 ± 1.4 points)",
    )
    told = verdict(points, parts=[rise, high, gap])
    assert (
        told[0] == "fails"
        and "; high: fails (test: 0.66" in told[1]
        and "gap: not run (no records)" in told[1]
    )
    assert verdict(points, parts=[rise, gap])[0] == "not run"
    assert verdict(Points.of(plan, []), parts=[rise, high]) == ("not run", "no records")
    assert (
        verdict(points, parts=[{**gap, "experiment": "other"}])[1] == "this scale has no experiment 'other'"
    )
    with pytest.raises(RecipeError, match="claim 1, part 1 lacks 'says'"):
        verdict(points, parts=[{k: v for k, v in rise.items() if k != "says"}])


def test_a_vote_is_judged_beside_its_prompts(study: Path) -> None:
    plan = Study.read("toy")
    (place,) = plan.places(["vote"])
    rule = {
        "rule": "above",
        "experiment": "vote",
        "what": "test",
        "than": "member.test",
        "beside": "extra.best",
    }

    def told(vote: float, each: list[float]) -> tuple[str, str]:
        voted = row(place.cell, -1, vote, members=len(each), best=max(each))
        return verdict(
            Points.of(plan, [voted, *(row(place.cell, n, one) for n, one in enumerate(each))]), **rule
        )

    assert told(0.9, [0.7, 0.71]) == (
        "holds",
        "test minus member.test: +19.5 ± 0.5 points over 1 setting(s); not below extra.best in 1 of 1",
    )
    assert told(0.75, [0.6, 0.8])[0] == "not visible here"  # 5 ± 10 points


def test_the_whole_way_on_the_command_line(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["study", *words])
        out = capsys.readouterr()
        assert not ended.value.code, out.err
        return out.out

    assert "9 cells run, 0 done before" in call("run", "toy", "--json", "done.json")
    assert len(files.read_json("done.json")["ran"]) == 9
    told = call("report", "toy", "--json", "report.json")
    assert "9 of 9 settings" in told and "3\tnot run\tno such thing" in told
    place = study / "runs" / "toy-small"
    page, text = ((place / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert (
        "88.8 (Table 1)" in text
        and "not printed (Figure 2)" in text
        and "| 2 | Nothing else changes |" in text
    )
    assert "each alone" in text and "Nearest pieces" in text and "## Provenance" in text
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:|//)", page.replace('xlink:href="#', ""))
    assert page.count("<svg") == 2 and "<script" not in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)
    assert [c["verdict"] for c in files.read_json("report.json")["claims"]][1:3] == ["holds", "not run"]
    call("report", "toy", "--folder", "again", "--records", str(place / "records.jsonl"))
    assert (study / "again" / "report.html").read_text(encoding="utf-8") == page  # equal records, equal bytes


def test_no_records_no_report(study: Path) -> None:
    with pytest.raises(DataError, match="there are no records at 'nowhere'; run the study first"):
        report.read_records(["nowhere"])
    plan = Study.read("toy")
    rows = made(plan, "length", {("2",): [0.5]})
    with pytest.raises(
        DataError, match=r"no record belongs to the study 'toy', scale 'small' \(1 of other settings\)"
    ):
        report.build(Study.read("toy", overrides=["train.steps=9"]), rows)


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("study.toml", 'title = "A toy study"\n', "study.toml lacks 'title': write it there"),
        ("study.toml", 'paper = "Figure 1"\n', "study.toml: [[sections]] 1 lacks 'paper'"),
        ("claims.toml", 'experiment = "size"\n', "claims.toml: claim 1 lacks 'experiment'"),
        ("claims.toml", "number = 2\n", "claims.toml: claim 2 lacks 'number'"),
        ("published.toml", 'columns = ["size", "score"]\n', "published.toml: [[tables]] 1 lacks 'columns'"),
    ],
)
def test_a_key_that_is_lacking_is_named(study: Path, file: str, line: str, says: str) -> None:
    path = study / "studies" / "toy" / file
    text = files.read_bytes(path).decode()
    assert line in text
    files.atomic_write(path, text.replace(line, "", 1))
    plan = Study.read("toy")
    with pytest.raises(RecipeError) as refused:
        report.build(plan, made(plan, "length", {("2",): [0.5]}))
    assert says in str(refused.value)
