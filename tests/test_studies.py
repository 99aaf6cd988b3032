import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from incipit import files
from incipit.recipe import PruneTable, Recipe

STUDIES = Path(__file__).parents[1] / "studies"
SST2 = sorted((STUDIES / "sst2").glob("*.toml"))
XPROMPT = sorted((STUDIES / "xprompt2022").glob("*.toml"))
SESOM = sorted((STUDIES / "sesom2023").glob("*/*.toml"))


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
    spec = importlib.util.spec_from_file_location("table", STUDIES / "table.py")
    assert spec is not None and spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    for seed, score in enumerate((0.5, 0.7)):
        files.append_jsonl(
            tmp_path / "r.jsonl",
            {"settings": {"name": "a"}, "seed": seed, "scores": {"test": {"accuracy": score}}, "parameters": 1200,
             "seconds": 3.0},
        )  # fmt: skip
    assert table.rows([str(tmp_path / "r.jsonl")]) == [["a", "2", "60.0", "14.1", "50.0, 70.0", "1,200", "3"]]


def test_the_numbers_of_the_pages_are_those_of_the_records() -> None:
    spec = importlib.util.spec_from_file_location("table", STUDIES / "table.py")
    assert spec is not None and spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
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
    """studies/xprompt2022/table.py."""
    spec = importlib.util.spec_from_file_location("xprompt", STUDIES / "xprompt2022" / "table.py")
    assert spec is not None and spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    return table


def test_the_recipes_of_xprompt() -> None:
    names = [p.stem for p in XPROMPT]
    paper = ["boolq", "cb", "copa", "multirc", "prune", "rte", "wic", "wsc"]
    small = ["news", "prune", "questions", "reviews", "tickets"]
    assert names == ["cost", *(f"paper-{n}" for n in paper), *(f"small-{n}" for n in small)]


@pytest.mark.parametrize("path", XPROMPT, ids=lambda p: p.stem)
def test_a_recipe_of_xprompt_builds(path: Path) -> None:
    opening = files.read_bytes(path).decode().splitlines()[:3]
    assert all(line.startswith("# ") for line in opening) and "incipit prune" in opening[1]
    if path.stem.endswith("prune") or path.stem == "cost":
        table = PruneTable.of(files.read_toml(path))
        assert table.pieces == 16 and len(table.token_ratios) == len(table.piece_ratios) == 9
        return
    recipe = Recipe.read(path)
    assert recipe.prompt.length == 20 and recipe.train.batch == 16
    if path.stem.startswith("paper"):  # section 7 of its facts: 100 epochs, Adafactor, 0.3, 1e-5, T5-XL
        t = recipe.train
        assert (t.optimiser, t.lr_absolute, t.weight_decay) == ("adafactor", 0.3, 1e-5)
        assert recipe.backbone.name == "google/t5-xl-lm-adapt" and recipe.prompt.start == "vocabulary"
        assert f"--set prune.search_steps={t.steps}" in opening[1]
    else:
        assert recipe.train.seeds == (0, 1, 2, 3, 4)


def test_the_paired_test_and_the_overlap_of_xprompt() -> None:
    table = xprompt()
    assert table.flipped([1.0, 2.0, 3.0]) == 2 / 8  # only all signs alike are as far from 0
    assert table.flipped([1.0, -1.0]) == 1.0
    lines = [
        {"extra": {"scores": {"tokens": tokens}}} for tokens in ([4, 3, 2, 1], [4, 1, 3, 2], [1, 2, 3, 4])
    ]
    seen, chance = table.overlap(lines)  # {0, 1}, {0, 2}, {2, 3}
    assert seen == pytest.approx((1 / 3 + 0 + 1 / 3) / 3) and chance == pytest.approx(1 / 3)


def test_the_page_of_xprompt_shows_its_records() -> None:
    table, folder = xprompt(), STUDIES / "xprompt2022"
    lines = [line for p in sorted((folder / "records").glob("*.jsonl")) for line in files.read_jsonl(p)]
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


# -- isolated -------------------------------------------------------------------------------------------


def test_joint_and_isolated_prompts_are_compared_alike() -> None:
    """Same data, seeds and settings but for the way; the page shows what the records say."""
    folder = STUDIES / "isolated"
    spec = importlib.util.spec_from_file_location("isolated", folder / "table.py")
    assert spec is not None and spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    assert {p.stem for p in folder.glob("*.toml")} == set(table.TASKS)
    for task in table.TASKS:
        recipe = Recipe.read(folder / f"{task}.toml")
        assert recipe.name == f"isolated-{task}" and recipe.prompt.attention == "joint"
        ways = [files.read_jsonl(folder / "records" / f"isolated-{task}{way}.jsonl") for way in ("", "-isolated")]
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
