"""The report: rules judge made-up records as a reader would by hand, and the page says what the records say."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from incipit import files
from incipit.cli import main
from incipit.errors import DataError, RecipeError
from incipit.study import Study, claims, report
from incipit.study.points import Points, error_of, mean_of

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
            == "prompt minus few-shot: +20.0 ± 1.4 points over 1 pair(s) of settings"
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
    assert found[0] == wanted and f"one {100 * gaps[0]:+.1f}, two {100 * gaps[1]:+.1f}" in found[1]


@pytest.mark.parametrize(
    ("rule", "two", "four", "wanted"),
    [
        ({"rule": "ordered", "along": "length"}, [0.5, 0.52], [0.8, 0.82], "holds"),
        ({"rule": "ordered", "along": "length"}, [0.8, 0.82], [0.5, 0.52], "fails"),
        ({"rule": "saturates", "along": "length", "steps": ["2", "4", "4"]}, [0.5, 0.52], [0.8, 0.82], "holds"),
        ({"rule": "saturates", "along": "length", "steps": ["2", "2", "4"]}, [0.5, 0.52], [0.8, 0.82],
         "not visible here"),
        ({"rule": "equal", "left": {"length": "2"}, "right": {"length": "4"}}, [0.5, 0.501], [0.505, 0.504], "holds"),
        ({"rule": "equal", "left": {"length": "2"}, "right": {"length": "4"}}, [0.5, 0.501], [0.6, 0.601], "fails"),
        ({"rule": "steady"}, [0.5, 0.51], [0.8, 0.81], "holds"),
        ({"rule": "steady"}, [0.5, 0.9], [0.5, 0.9], "fails"),
        ({"rule": "within", "what": "test", "at_least": 0.5}, [0.5, 0.7], [0.6, 0.6], "holds"),
        ({"rule": "within", "what": "test", "at_most": 0.5}, [0.5, 0.7], [0.6, 0.6], "fails"),
        ({"rule": "above", "what": "test", "than": "extra.random"}, [0.5, 0.7], [0.6, 0.6], "holds"),
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
    assert verdict(Points.of(plan, rows), **rule) == ("holds", "one: 70.5 ± 0.5, two: 80.5 ± 0.5")
    rows += made(
        plan, "size", {("model", "one"): [0.1, 0.11]}
    )  # of the other size there is none: it is left out
    assert verdict(Points.of(plan, rows), **rule) == ("holds", "one: 70.5 ± 0.5, two: 80.5 ± 0.5")
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
    assert error_of([[0.0, 1.0], [0.0, 1.0]]) == pytest.approx((2 * 0.25) ** 0.5 / 2)
    assert error_of([[1.0]]) == float("inf")


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
