"""The study of the paper: every recipe of both scales is built, and those of the paper run their first steps."""

import json
from pathlib import Path

import pytest

from incipit import files
from incipit.backbones import tiny
from incipit.pretrain import PretrainSettings
from incipit.recipe import settings_of
from incipit.study import Study, claims, grid
from incipit.study.claims import RULES
from incipit.study.points import Points
from incipit.tasks import catalogue

FOLDER = Path(__file__).parents[2] / "studies" / "lester2021"
SIZES = ["small", "base", "large", "xl", "xxl"]
SUPERGLUE = ["boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"]
FEW = ["train.steps=1", "train.batch=2", "train.eval_every=1", "train.eval_limit=2", "train.seeds=[0]"]
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
                "size": 48,
                "length-by-size": 12,
                "start-by-size": 12,
            }
            | {"objective": 12, "adaptation": 16, "visibility": 4},
        ),
        (
            "paper",
            {"size": 160, "length": 200, "start": 120, "objective": 120, "adaptation": 160, "shift": 3}
            | {"paraphrase-qqp": 3, "paraphrase-mrpc": 3, "ensemble": 8},
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
        if place.cell.do == "few-shot" or recipe.train.method == "model":
            continue
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


def test_claims_and_published_numbers() -> None:
    told = files.read_toml(FOLDER / "claims.toml")["claims"]
    assert [claim["number"] for claim in told] == list(range(1, 31))
    assert all(("rule" in claim) != ("note" in claim) and claim["source"] for claim in told)
    assert {claim["rule"] for claim in told if "rule" in claim} <= set(RULES)
    small = Study.read(str(FOLDER), "small")
    for claim in told:
        if "rule" not in claim:
            continue
        places = small.places([claim["experiment"]])  # each label that a claim names is on its axis
        for side in ("left", "right", "where"):
            for axis, label in claim.get(side, {}).items():
                assert label in {p.coordinates[axis] for p in places}, claim["number"]
    judged = claims.judge(told, Points.of(small, []), "small")
    assert {claim.verdict for claim in judged} == {"not run"}
    published = files.read_toml(FOLDER / "published.toml")
    assert [table["id"] for table in published["tables"]] == [
        "spot",
        "T1",
        "T2",
        "T3",
        "T4",
        "T5",
        "T6",
        "T7-16",
    ]
    for table in published["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"]) and table["source"]
    sections = files.read_toml(FOLDER / "study.toml")["sections"]
    shown = [name for section in sections for name in section.get("published", [])]
    assert sorted(shown) == sorted(table["id"] for table in published["tables"])
    drawn = {name for section in sections for name in section.get("experiments", [])}
    assert drawn == set(small.experiments)


STEPS = ["text", "reading", "span", "lm200", "lm1000", "lm2000"]  # each from the one before
OBJECTIVES = {"text": "causal", "reading": "continuation", "span": "span_corruption"}


def test_no_step_of_the_ladder_is_lost() -> None:
    assert [p.stem for p in LADDER] == [
        f"{size}-{step}" for size in ("0.5m", "1.5m", "4m", "9m") for step in sorted(STEPS)
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
