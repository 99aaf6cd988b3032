"""The study of the paper: every recipe of both scales is built, and those of the paper run their first steps."""

import json
from pathlib import Path
from typing import Any

import pytest

from incipit import files
from incipit.backbones import tiny
from incipit.pretrain import PretrainSettings
from incipit.recipe import settings_of
from incipit.study import Study, claims, drawn, grid, report
from incipit.study.page import Figure, Text
from incipit.study.plan import Place
from incipit.study.points import Points
from incipit.study.rules import RULES
from incipit.tasks import catalogue

FOLDER = Path(__file__).parents[2] / "studies" / "lester2021"
SIZES = ["small", "base", "large", "xl", "xxl"]
SUPERGLUE = ["boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"]
FEW = ["train.steps=1", "train.batch=2", "train.eval_every=1", "train.eval_limit=4", "train.seeds=[0]"]
FEW += ["backbone.dtype=float32", "backbone.device=cpu", "decode.max_new_tokens=2"]
LADDER = sorted((FOLDER / "ladder").glob("*.toml"))


VARIED = ("sentence", "sentence1", "question1", "premise", "passage", "paragraph", "context", "text")


def toy(form: str, copies: int) -> list[str]:
    """The worked records of a form, of a classification one a label, `copies` times with another number each."""
    own = catalogue.published(form)
    records = [json.loads(worked["record"]) for worked in own["worked"]]
    if isinstance(own.get("labels"), dict):
        records = [{**records[0], "label": raw} for raw in own["labels"]]
    found = []
    for i in range(copies):
        for one in records:
            key = next((k for k in VARIED if isinstance(one.get(k), str)), None)
            found.append(json.dumps({**one, key: f"{one[key]} {i}"} if key else one))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy data in the layout of the published files, made of the forms' worked examples."""
    folder = tmp_path_factory.mktemp("data")
    for form in catalogue.names():
        own = catalogue.published(form)
        for split, copies in (("train", 12), ("validation", 2), ("test", 2)):
            files.atomic_write(folder / own["name"] / f"{split}.jsonl", "\n".join(toy(form, copies)) + "\n")
    return folder


@pytest.mark.parametrize(
    ("scale", "counts"),
    [
        (
            "small",
            {
                "length": 5,
                "start": 6,
                "population": 2,
                "rate": 5,
                "steps": 3,
                "kinds": 7,
                "shift": 3,
                "ensemble": 2,
            }
            | {
                "paraphrase-qqp": 3,
                "paraphrase-mrpc": 3,
                "size": 60,
                "length-by-size": 15,
                "start-by-size": 15,
            }
            | {"objective": 15, "adaptation": 20, "visibility": 9, "noise": 4, "placement": 6}
            | {"wayward": 5, "transfer": 3, "recycling": 9},
        ),
        (
            "paper",
            {"size": 160, "length": 200, "start": 120, "objective": 120, "adaptation": 160, "shift": 3}
            | {"paraphrase-qqp": 3, "paraphrase-mrpc": 3, "ensemble": 8, "runtime": 20},
        ),
    ],
)
def test_every_recipe_is_built(scale: str, counts: dict[str, int]) -> None:
    study = Study.read(str(FOLDER), scale)
    places = study.places()
    assert {name: len(study.places([name])) for name in study.experiments} == counts
    assert all(len(p.cell.seeds) >= 3 for p in places)
    opening = files.read_bytes(FOLDER / f"{scale}.toml").decode().splitlines()[1]
    assert "incipit study run lester2021" in opening


def test_the_settings_of_the_paper() -> None:
    study = Study.read(str(FOLDER), "paper")
    for place in study.places():
        recipe, at = place.cell.recipe, place.coordinates
        if place.cell.do == "few-shot":
            continue
        if recipe.train.method == "model":  # T5's defaults: the weight decay of section 3 is of prompts
            assert (recipe.train.lr, recipe.train.weight_decay, recipe.train.optimiser) == (
                0.001,
                0.0,
                "adafactor",
            )
            continue
        free = at["task"] in ("record", "wsc", "squad")
        assert recipe.decode.max_new_tokens == (62 if free else 16)
        train, prompt = recipe.train, recipe.prompt
        assert (train.steps, train.batch, train.lr_absolute, train.weight_decay) == (30000, 32, 0.3, 1e-5)
        assert (train.optimiser, train.schedule, recipe.decode.mode) == ("adafactor", "constant", "generate")
        assert prompt.length == int(at.get("length", 100)) and prompt.vocabulary == 5000
        if place.experiment == "size":
            assert prompt.start == ("text" if at["task"] in ("record", "wsc") else "label")
    names = {p.cell.recipe.backbone.name for p in study.places(["size"])}
    assert names == {f"google/t5-{size}-lm-adapt" for size in SIZES}
    sentinels = {p.cell.recipe.backbone.sentinel for p in study.places(["objective"])}
    assert sentinels == {"", "<extra_id_0>"}
    assert len(study.places(["ensemble"])[0].cell.seeds) == 5
    lengths = {p.coordinates["length"] for name in ("length", "runtime") for p in study.places([name])}
    assert lengths == {"1", "5", "20", "50", "100", "150"}  # Table 4


def test_the_first_steps_of_every_setting_of_the_paper(data: Path, tmp_path: Path) -> None:
    """On a tiny T5: every task, method, length, start, objective and shift; the sizes differ by the backbone alone."""
    tiny.save("t5", tmp_path / "t5")
    settings = files.read_json(tmp_path / "t5" / "tokenizer_config.json")
    files.write_json(tmp_path / "t5" / "tokenizer_config.json", settings | {"model_max_length": 1024})
    study = Study.read(str(FOLDER), "paper", data, FEW)
    done: set[str] = set()
    bench = grid._Bench(study, tmp_path / "runs", "", str(tmp_path / "t5"), print)
    for place in study.places():
        at = place.coordinates
        if at.get("size", "small") != "small" or (place.experiment == "adaptation" and at["task"] != "boolq"):
            continue
        if place.experiment in ("length", "start", "objective") and at["task"] not in ("cb", "record"):
            continue
        if place.cell.key in done:
            continue
        rows = bench.run(place.cell, [0])
        assert rows and all(row["scores"] for row in rows), place.cell.name
        done.add(place.cell.key)
    tasks = {name.split("/")[1] for name in (row["name"] for row in bench.rows)}
    assert {*SUPERGLUE, "squad", "qqp", "mrpc"} <= tasks and len(done) >= 50


def statements(claim: dict[str, Any]) -> list[dict[str, Any]]:
    """The tables of a claim that have a rule."""
    return [table for table in (claim, *claim.get("parts", [])) if "rule" in table]


def test_claims() -> None:
    told = files.read_toml(FOLDER / "claims.toml")["claims"]
    assert [claim["number"] for claim in told] == list(range(1, 31))
    assert all(
        sum(key in claim for key in ("rule", "parts", "note")) == 1 and claim["source"] for claim in told
    )
    assert all("rule" in part and part["says"] for claim in told for part in claim.get("parts", []))
    scales = {scale: Study.read(str(FOLDER), scale) for scale in ("small", "paper")}
    for claim, table in [(one, table) for one in told for table in statements(one)]:
        assert table["rule"] in RULES
        for scale, study in scales.items():
            own = {**table, **table.get(scale, {})}
            if scale == "paper" and own["experiment"] not in study.experiments:
                continue
            places = study.places([own["experiment"]])  # each label that a claim names is on its axis
            for side in ("left", "right", "where"):
                for axis, label in own.get(side, {}).items():
                    assert label in {p.coordinates[axis] for p in places}, (claim["number"], scale)
            for label in (*own.get("labels", []), *own.get("steps", [])):
                assert label in {p.coordinates[own["along"]] for p in places}, (claim["number"], scale)
    judged = claims.judge(told, Points.of(scales["small"], []), "small")
    assert {claim.verdict for claim in judged} == {"not run"}


def test_a_rate_that_is_far_above_is_compared_with_one_above_that_of_model_tuning() -> None:
    (claim,) = [c for c in files.read_toml(FOLDER / "claims.toml")["claims"] if c["number"] == 22]
    tuned = files.read_toml(FOLDER / "small.toml")["methods"]["model"]["train.lr"]
    assert float(claim["left"]["rate"]) >= 50 * tuned and float(claim["right"]["rate"]) > 3 * tuned


def test_published_numbers() -> None:
    published = files.read_toml(FOLDER / "published.toml")
    ids = ["F1", "spot", "spot-steps", "F2", "F4", "T1", "T2", "T3", "T4", "T5", "T6", "T7-16"]
    assert [table["id"] for table in published["tables"]] == ids
    for table in published["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"]) and table["source"]
    paper = Study.read(str(FOLDER), "paper")
    for value in published["values"]:  # each stands beside a row of the paper's scale
        where = {axis: label for axis, label in value["where"].items() if axis != "on"}
        places = [p for p in paper.places([value["experiment"]]) if where.items() <= p.coordinates.items()]
        assert places and value["source"], value
        tasks = list(dict.fromkeys(p.coordinates["task"] for p in places))
        known = {"each alone", "mean over " + ", ".join(tasks), *tasks}
        assert value["where"]["on"] in known | {name for p in places for name in p.cell.shift}, value


def test_every_experiment_has_a_section() -> None:
    sections = files.read_toml(FOLDER / "study.toml")["sections"]
    shown = [name for section in sections for name in section.get("published", [])]
    tables = files.read_toml(FOLDER / "published.toml")["tables"]
    assert sorted(shown) == sorted(table["id"] for table in tables)
    named = {name for section in sections for name in section.get("experiments", [])}
    scales = [Study.read(str(FOLDER), scale) for scale in ("small", "paper")]
    assert named == {name for study in scales for name in study.experiments}
    told = " ".join(section["paper"] for section in sections)  # every figure and table of the paper
    assert all(f"Figure {n}" in told for n in ("1", "2", "3a", "3b", "3c", "3d", "4"))
    assert all(
        name in told
        for name in ("Tables 1 and 2", "Table 3", "Table 4", "Table 5", "Table 6", "Tables 7 to 16")
    )


def invented(place: Place, parameters: int) -> list[dict[str, Any]]:
    """Rows as a cell would write them: scores by hand, the seed's number in the third digit."""
    cell, at = place.cell, place.coordinates
    voted = [-1] if cell.do == "ensemble" else []
    found = []
    for seed in [*voted, *cell.seeds]:
        score = (0.6 if at["method"] == "few-shot" else 0.8) + seed / 1000
        metrics = cell.recipe.spec.metric_names()
        own = {metric: score - n / 10 for n, metric in enumerate(metrics)} | {"legal_rate": 0.9}
        if cell.recipe.mixture is not None:
            own = {f"{task}.{spec.metric_names()[0]}": score for task, spec in cell.recipe.mixed.items()}
        scores = {"test": own} | {f"shift:{name}": {"mean": score - 0.1} for name in cell.shift}
        trained = {"few-shot": 0, "tune": parameters}.get(cell.do, 0) if at["method"] != "prompt" else 100
        extra = {"bytes": 4 * trained, "norm": 1.5, "neighbours": [["good", "fine"]]}
        if seed == -1:
            extra |= {"members": len(cell.seeds), "mean": score, "best": score, "equal": 1.0}
        provenance = {"commit": "0" * 40, "dirty": False, "versions": {}, "machine": {}, "time": "1"}
        found.append(
            {"name": cell.name, "seed": seed, "scores": scores, "settings": {"cell": cell.key},
             "data": {"task": at["task"]}, "provenance": provenance,
             "backbone": {"name": cell.backbone, "fingerprint": {}, "parameters": parameters},
             "seconds": 1.0, "parameters": trained, "extra": extra}
        )  # fmt: skip
    return found


def sketched(series: dict[str, Any], places: list[str], x: str, y: str, title: str, **_: bool) -> str:
    """The words of a figure in place of the figure, which takes its time."""
    assert all(numbers for points in series.values() for _, numbers in points)
    return "".join(f"<text>{word}</text>" for word in (title, x, y, *series, *places))


def test_every_experiment_of_the_small_scale_has_its_table_and_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once its rows are there; sizes that were run out of order stand in the study's order."""
    monkeypatch.setattr(drawn.figures, "lines", sketched)
    study = Study.read(str(FOLDER), "small")
    rows = [row for p in study.places() for row in invented(p, int(study.parameters(p.cell.backbone)))]
    made = report.build(study, rows)
    assert (made.run, made.places) == (200, 200)
    told = [block.text for block in made.blocks if isinstance(block, Text)]
    assert {f"Ours, {name}:" for name in study.experiments} <= set(told)
    assert "Ours, runtime: not at this scale." in told
    figures = {block.name: block for block in made.blocks if isinstance(block, Figure)}
    assert {name.rpartition("-")[0] for name in figures} == set(study.experiments)
    assert {"size-trec", "size-ag_news", "size-dbpedia14", "size-mean", "size-share", "kinds-share"} <= set(
        figures
    )
    for name in ("prompt", "model", "multi-task", "few-shot"):
        assert f">{name}<" in figures["size-trec"].svg
    places = [figures["size-trec"].svg.index(f">{size}<") for size in ("0.2M", "0.5M", "1.5M", "4M", "9M")]
    assert places == sorted(places) and len({figure.says for figure in figures.values()}) == len(figures)
    first = {
        place.cell.key for place in study.places(["size"]) if place.coordinates["size"] in ("4M", "0.5M")
    }
    few = [
        r for r in rows if r["settings"]["cell"] in first or "few-shot" in r["name"]
    ]  # the first lines lack sizes
    (trec,) = [
        b
        for b in report.build(study, few, ["size"]).blocks
        if isinstance(b, Figure) and b.name == "size-trec"
    ]
    places = [trec.svg.index(f">{size}<") for size in ("0.2M", "0.5M", "1.5M", "4M", "9M")]
    assert places == sorted(places)
    report.write(made, tmp_path)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    means = page.split("Mean over 2 tasks (trec, sst2):")  # the paper's mean is of other tasks
    assert len(means) == 6 and not [told for told in means[1:] if "91.3" in told[:200]]
    assert (
        "80.1 ± 0.1 (f1_binary 70.1, accuracy 60.1)" in page
    )  # of a paraphrase task, whose score is the mean


STEPS = ["text", "reading", "span", "lm50", "lm250", "lm500"]  # each from the one before
OBJECTIVES = {"text": "causal", "reading": "continuation", "span": "span_corruption"}


def test_no_step_of_the_ladder_is_lost() -> None:
    assert [p.stem for p in LADDER] == [
        f"{size}-{step}" for size in ("0.2m", "0.5m", "1.5m", "4m", "9m") for step in sorted(STEPS)
    ]


@pytest.mark.parametrize("path", LADDER, ids=lambda p: p.stem)
def test_a_step_of_the_ladder(path: Path) -> None:
    settings = settings_of(PretrainSettings, files.read_toml(path), (), str(path))
    size, step = path.stem.rsplit("-", 1)
    assert settings.name == f"t5-{path.stem}" and settings.fit.optim.name == "muon"
    assert settings.family == ("causal" if step == "text" else "encoder-decoder")
    before = f"runs/ladder/{size}-{STEPS[STEPS.index(step) - 1]}/export" if step != "text" else ""
    assert (settings.blocks, settings.start) == ((before, "") if step == "reading" else ("", before))
    assert dict(settings.stages[0][1]) == {OBJECTIVES.get(step, "lm_adaptation"): 1.0}
    lender = settings_of(PretrainSettings, files.read_toml(path.with_name(f"{size}-text.toml")), (), "")
    assert isinstance(settings, PretrainSettings) and isinstance(lender, PretrainSettings)
    shape = ("hidden", "layers", "heads", "ffn", "vocabulary")  # blocks are lent between equal shapes alone
    assert [getattr(settings, k) for k in shape] == [getattr(lender, k) for k in shape]
    if step != "text":
        assert settings.activation == "silu"
        norm = settings.units["decoder.final_layer_norm.weight"]
        assert norm == pytest.approx(settings.hidden**0.5, abs=0.05)
        assert settings.units["*.EncDecAttention.*"] == 3.0
    assert (
        f"incipit pretrain studies/lester2021/ladder/{path.name}"
        in files.read_bytes(path).decode().splitlines()[1]
    )


def test_the_studys_backbones_know_what_they_start_from() -> None:
    backbones = files.read_toml(FOLDER / "small.toml")["backbones"]
    study = Study.read(str(FOLDER), "small")
    for label, table in backbones.items():
        if "pretrain" not in table:
            continue
        path = FOLDER / table["pretrain"]
        recipe = files.read_toml(path)
        start = recipe.get("start", "") or recipe.get("blocks", "")
        after = backbones[table["after"]]["pretrain"] if "after" in table else ""
        assert (f"runs/ladder/{Path(after).stem}/export" if after else "") == start
        made_by = json.dumps(study.origin(label)).count('"') // 2  # hashes of recipes
        assert made_by == 1 + STEPS.index(path.stem.rsplit("-", 1)[1])
