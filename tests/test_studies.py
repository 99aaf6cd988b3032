import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from incipit import files
from incipit.recipe import PruneTable, Recipe
from incipit.study import Study, comparison
from incipit.study.page import Figure, as_markdown
from incipit.study.points import Points

STUDIES = Path(__file__).parents[1] / "studies"
SST2 = sorted((STUDIES / "sst2").glob("*.toml"))
XPROMPT = sorted((STUDIES / "xprompt2022").glob("*.toml"))
SESOM = sorted((STUDIES / "sesom2023").glob("*/*.toml"))


def script(path: str) -> ModuleType:
    """A script below studies/, which is no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, STUDIES / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipes_of_sesom_build() -> None:
    names = [path.relative_to(STUDIES / "sesom2023").as_posix() for path in SESOM]
    assert len(names) == 20 and sum("target" in name for name in names) == 12
    for path in SESOM:
        recipe = Recipe.read(path)
        opening = files.read_bytes(path).decode().splitlines()[:3]
        assert all(line.startswith("# ") for line in opening), path
        target = path.stem.startswith("target-")
        assert (f"incipit {'ensemble --recipe' if target else 'tune'} {path.name}") in opening[1]
        assert (recipe.ensemble is not None) == target
        if recipe.ensemble is not None:  # every source has a recipe beside it
            beside = {p.stem for p in path.parent.glob("source-*.toml")}
            assert {Path(source).name for source in recipe.ensemble.sources} == beside
            assert recipe.spec.shots in (11, 16)


def test_no_recipe_was_lost() -> None:
    assert [p.stem for p in SST2] == [
        "lm-model",
        "lm-prompt",
        "minilm-head",
        "minilm-model",
        "minilm-prefix",
        "minilm-prompt",
        "t5-model",
        "t5-prompt",
    ]


@pytest.mark.parametrize("path", SST2, ids=lambda p: p.stem)
def test_a_recipe_is_read_and_opens_with_its_command(path: Path) -> None:
    recipe = Recipe.read(path)
    assert recipe.name == f"sst2-{path.stem}"
    assert set(recipe.spec.labels) == {"0", "1"}
    opening = files.read_bytes(path).decode().splitlines()[:3]
    assert all(line.startswith("# ") for line in opening)
    assert f"incipit tune {path.name}" in opening[1]


def test_the_table_of_records(tmp_path: Path) -> None:
    table = script("table.py")
    for seed, score in enumerate((0.5, 0.7)):
        files.append_jsonl(
            tmp_path / "r.jsonl",
            {"settings": {"name": "a"}, "seed": seed, "scores": {"test": {"accuracy": score}}, "parameters": 1200,
             "seconds": 3.0},
        )  # fmt: skip
    assert table.rows([str(tmp_path / "r.jsonl")]) == [["a", "2", "60.0", "14.1", "50.0, 70.0", "1,200", "3"]]


def test_the_numbers_of_the_pages_are_those_of_the_records() -> None:
    table = script("table.py")
    found = table.rows([str(p) for p in sorted((STUDIES / "sst2" / "records").glob("*.jsonl"))])
    assert len(found) == 14
    page = files.read_bytes(STUDIES / "sst2" / "README.md").decode()
    for name, seeds, mean, deviation, *_ in found:
        assert seeds == ("1" if name.endswith("zero-shot") else "3")
        assert f"| {mean} ± {deviation} |" in page if deviation else f"| {mean} |" in page, name
    front = files.read_bytes(STUDIES.parent / "README.md").decode()
    for name, row in files.read_json(STUDIES / "demo" / "demo.json")["tasks"].items():
        backbone = row["backbone"]
        shown = f"| {row['few_shot']:.2f} | {row['prompt_tuning']:.2f} |"
        assert any(shown in line and backbone in line for line in front.splitlines()), (name, shown)


# -- xprompt2022 ----------------------------------------------------------------------------------------


def xprompt() -> ModuleType:
    return script("xprompt2022/table.py")


def test_the_recipes_of_xprompt() -> None:
    names = [p.stem for p in XPROMPT]
    paper = ["boolq", "cb", "copa", "multirc", "prune", "rte", "wic", "wsc"]
    small = ["emotion", "mpqa", "prune", "sst2", "tickets", "trec"]
    assert names == ["cost", *(f"paper-{n}" for n in paper), *(f"small-{n}" for n in small), "study"]


@pytest.mark.parametrize("path", XPROMPT, ids=lambda p: p.stem)
def test_a_recipe_of_xprompt_builds(path: Path) -> None:
    opening = files.read_bytes(path).decode().splitlines()[:3]
    if path.stem == "study":
        assert "incipit study report xprompt2022" in opening[0]
        return
    assert all(line.startswith("# ") for line in opening) and "incipit prune" in opening[1]
    if path.stem.endswith("prune") or path.stem == "cost":
        table = PruneTable.of(files.read_toml(path))
        assert table.pieces == 16 and len(table.token_ratios) == len(table.piece_ratios) == 9
        return
    recipe = Recipe.read(path)
    short = path.stem.startswith("small") and path.stem != "small-tickets"
    assert recipe.prompt.length == 20 and recipe.train.batch == (8 if short else 16)
    if path.stem.startswith("paper"):  # section 7 of its facts: 100 epochs, Adafactor, 0.3, 1e-5, T5-XL
        t = recipe.train
        assert (t.optimiser, t.lr_absolute, t.weight_decay) == ("adafactor", 0.3, 1e-5)
        assert recipe.backbone.name == "google/t5-xl-lm-adapt" and recipe.prompt.start == "vocabulary"
        assert f"--set prune.search_steps={t.steps}" in opening[1]
    else:
        assert recipe.train.seeds == (0, 1, 2, 3, 4)


def test_the_page_of_xprompt_shows_its_records() -> None:
    table, folder = xprompt(), STUDIES / "xprompt2022"
    names = ("cost", "xprompt-tickets")
    lines = [line for name in names for line in files.read_jsonl(folder / "records" / f"{name}.jsonl")]
    costs = [line for line in lines if line["name"].startswith("cost-")]
    tried = [line for line in lines if line not in costs]
    page = files.read_bytes(folder / "README.md").decode()
    for row in [*table.cost_table(costs), *table.score_table(tried), *table.about(tried)]:
        assert "| " + " | ".join(row) + " |" in page, row
    assert not [line for line in lines if line["provenance"]["dirty"]]


def test_the_search_of_xprompt_costs_less_than_three_trainings() -> None:
    costs = files.read_jsonl(STUDIES / "xprompt2022" / "records" / "cost.jsonl")
    assert [line["name"] for line in costs] == ["cost-zeroed", "cost-removed"]
    for line in costs:
        assert len([row for row in line["extra"]["rows"] if row["stage"] in ("tokens", "pieces")]) == 18
    assert all(float(row[-2]) <= 3 and float(row[-1]) <= 3 for row in xprompt().cost_table(costs))


# -- studies of paired runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xprompt2022", "sesom2023"])
def test_a_page_of_paired_runs_shows_its_records(name: str) -> None:
    fill = script("fill.py")
    folder = STUDIES / name
    page = files.read_bytes(folder / "README.md").decode()
    assert fill.OPEN in page and fill.CLOSE in page
    story = files.read_toml(folder / "study.toml")
    assert [c["number"] for c in story["claims"]] == list(range(1, len(story["claims"]) + 1))
    assert all("rule" in c or "note" in c for c in story["claims"])
    if not files.exists(folder / "records" / "small.jsonl"):  # nothing was run: then nothing is told
        assert not page.partition(fill.OPEN)[2].partition(fill.CLOSE)[0].strip()
        return
    rows = files.read_jsonl(folder / "records" / "small.jsonl")
    assert rows and not [row for row in rows if row["provenance"]["dirty"]]
    made = comparison.build(folder, rows)
    assert page == fill.filled(page, made), f"python studies/fill.py {name} writes the tables of the page"


def test_an_ensemble_costs_the_memory_of_one_and_says_the_same() -> None:
    path = STUDIES / "sesom2023" / "records" / "cost.jsonl"
    for row in files.read_jsonl(path) if files.exists(path) else ():
        assert row["extra"]["memory"] <= 1.3 and row["extra"]["difference"] <= 1e-4
        assert set(row["extra"]["ways"]) == {"one", "together", "apart"}


# -- lester2021 -----------------------------------------------------------------------------------------


def lester() -> ModuleType:
    return script("lester2021/table.py")


def test_the_pages_of_lester_show_their_records() -> None:
    table, folder = lester(), STUDIES / "lester2021"
    found = table.made()
    front = files.read_bytes(folder / "README.md").decode()
    assert table.page(front, table.results(found)) == front
    assert files.read_bytes(folder / "report.md").decode() == as_markdown(found.blocks, "figures")
    figures = {block.name for block in found.blocks if isinstance(block, Figure)}
    assert {p.stem for p in folder.glob("figures/*.svg")} == figures and figures
    whole = files.read_bytes(folder / "report.html").decode()
    fetched = re.search(
        r"(src|href|url)\s*[=(]\s*[\"']?(https?:|//)", whole
    )  # names of namespaces are no addresses
    assert whole.count("<svg") == len(figures) and "<script" not in whole and not fetched


def test_every_record_of_lester_counts_and_has_its_provenance() -> None:
    rows = files.read_jsonl(lester().RECORDS)
    study = Study.read(str(STUDIES / "lester2021"), "small")
    assert rows and not [row for row in rows if row["provenance"]["dirty"]]
    assert len(Points.of(study, rows).rows()) == len(rows)
    for row in rows:
        assert {"commit", "versions", "machine", "time"} <= set(row["provenance"]) and row["data"]


def test_new_records_are_added_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = lester()
    rows = files.read_jsonl(table.RECORDS)[:3]
    files.append_jsonl(tmp_path / "new.jsonl", rows[0])
    files.append_jsonl(
        tmp_path / "new.jsonl", rows[1] | {"provenance": rows[1]["provenance"] | {"dirty": True}}
    )
    files.append_jsonl(tmp_path / "new.jsonl", rows[2])
    monkeypatch.setattr(table, "RECORDS", tmp_path / "small.jsonl")
    files.append_jsonl(tmp_path / "small.jsonl", rows[0])
    assert table.add([str(tmp_path / "new.jsonl")]) == 1 and table.add([str(tmp_path / "new.jsonl")]) == 0
    assert files.read_jsonl(tmp_path / "small.jsonl") == [rows[0], rows[2]]


# -- isolated -------------------------------------------------------------------------------------------


def test_joint_and_isolated_prompts_are_compared_alike() -> None:
    """Same data, seeds and settings but for the way; the page shows what the records say."""
    folder = STUDIES / "isolated"
    table = script("isolated/table.py")
    assert {p.stem for p in folder.glob("*.toml")} == set(table.TASKS)
    for task in table.TASKS:
        recipe = Recipe.read(folder / f"{task}.toml")
        assert recipe.name == f"isolated-{task}" and recipe.prompt.attention == "joint"
        ways = [
            files.read_jsonl(folder / "records" / f"isolated-{task}{way}.jsonl") for way in ("", "-isolated")
        ]
        for joint, isolated in zip(*ways, strict=True):
            settings = [line["settings"] for line in (joint, isolated)]
            assert [s["prompt"].pop("attention") for s in settings] == ["joint", "isolated"]
            assert [s.pop("name") for s in settings] == [recipe.name, f"{recipe.name}-isolated"]
            assert settings[0] == settings[1] and joint["seed"] == isolated["seed"]
            assert not joint["provenance"]["dirty"] and not isolated["provenance"]["dirty"]
        assert len(ways[0]) == 3
    page = files.read_bytes(folder / "README.md").decode()
    assert page == table.page(page)
    method = files.read_bytes(STUDIES.parent / "docs" / "methods" / "isolated.md").decode()
    assert all(line in method for line in table.table().splitlines())
