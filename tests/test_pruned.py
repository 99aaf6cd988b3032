"""A tuned prompt -> a pruned one: the search, the controls, what is written, rewinding, misuse."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from incipit import artifact, files
from incipit.assemble import make_prompt
from incipit.backbones import Backbone, tiny, wrap
from incipit.errors import ArtifactError, BackboneError, PromptError, RecipeError, StorageError, TrainingError
from incipit.prompts import InputPrompt, Masked
from incipit.prompts.masked import rows_within
from incipit.recipe import PruneTable, Recipe
from incipit.run import Pruned, prompt_choice, prune, pruned, tune
from incipit.run.members import Data
from incipit.run.rewind import Source, target

REVIEWS = {"builtin": "reviews", "limit": 12}
FAMILIES = ("llama", "t5", "bert")


def recipe(family: str, name: str = "mood", **tables: Any) -> Recipe:
    return Recipe.of(
        {
            "name": name,
            "backbone": {"name": f"tiny:{family}", "device": "cpu"},
            "prompt": {"length": 6} | tables.pop("prompt", {}),
            "task": tables.pop("task", REVIEWS),
            "train": {"steps": 4, "batch": 3, "eval_every": 2, "lr": 0.2} | tables.pop("train", {}),
        }
    )


def settings(**keys: Any) -> PruneTable:
    few = {"token_ratios": [0.2, 0.5], "piece_ratios": [0.25, 0.5], "pieces": 4}
    return PruneTable.of({"prune": few | keys})


@pytest.fixture(scope="session")
def models() -> dict[str, Backbone]:
    return {name: wrap(name, *tiny.build(name)) for name in FAMILIES}


@pytest.fixture(scope="session")
def mood(models: dict[str, Backbone], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One tuned prompt of each family."""
    folder = tmp_path_factory.mktemp("tuned")
    return {
        name: tune([recipe(name)], folder / name, show=False, backbone=models[name])[0].place
        for name in FAMILIES
    }


def table_of(place: str, backbone: Backbone) -> Masked:
    found = rows_within(artifact.load(place).prompt(backbone))
    assert isinstance(found, Masked)
    return found


def named(found: Pruned) -> dict[str, Any]:
    return {f"{row.stage}: {row.name}": row for row in found.rows}


@pytest.mark.parametrize("family", FAMILIES)
def test_from_scores_to_an_artifact(
    family: str, models: dict[str, Backbone], mood: dict[str, str], tmp_path: Path
) -> None:
    everything = ["restart", "random", "reversed", "shorter", "form", "trained", "initial", "early", "fresh"]
    asked = settings(controls=everything, draws=2, plain=2)
    found = prune(mood[family], tmp_path / "out", asked, show=False, backbone=models[family])
    rows = named(found)

    searched = [r for r in found.rows if r.stage in ("tokens", "pieces")]
    assert [(r.token_ratio, r.piece_ratio) for r in searched[:2]] == [(0.2, 0), (0.5, 0)]
    assert [(r.tokens, r.kept) for r in searched[:2]] == [(5, 160), (3, 96)]  # of 6 rows of 32 numbers
    assert all(r.steps == 2 and not r.test for r in searched) and len(searched) == 4
    best = max(searched, key=lambda r: (r.dev["accuracy"], -r.kept))
    pruned = rows["retrained: pruned"]
    assert (pruned.token_ratio, pruned.piece_ratio) == (best.token_ratio, best.piece_ratio)
    assert (pruned.tokens, pruned.kept) == (best.tokens, best.kept) and pruned.steps == 4 and pruned.test
    assert [r for r in searched if r.chosen] == [r for r in found.rows if r.name == best.name]

    controls = {name.removeprefix("control: "): row for name, row in rows.items() if row.stage == "control"}
    assert set(controls) == {"restart", "random-0", "random-1", "reversed", "shorter", "removed", "from initial",
                             "from early", "from fresh", "plain-0", "plain-1", "best of 2 plain"}  # fmt: skip
    assert {controls[n].kept for n in ("random-0", "random-1", "removed", "from early")} == {pruned.kept}
    assert controls["reversed"].kept == 6 * 32 - pruned.kept
    assert controls["shorter"].kept == controls["shorter"].tokens * 32
    assert abs(controls["shorter"].kept - pruned.kept) <= 16  # half a row
    assert controls["restart"].kept == controls["plain-0"].kept == 6 * 32
    plain = [controls["plain-0"], controls["plain-1"]]
    taken = controls["best of 2 plain"]
    assert taken.dev["accuracy"] == max(r.dev["accuracy"] for r in plain) and taken.chosen
    came = artifact.load(mood[family]).card["scores"]
    assert rows["untrained: as it came"].dev == came["validation"]
    assert rows["untrained: as it came"].test == came["test"]

    kept = table_of(found.place, models[family])
    assert torch.equal(kept.mask, found.mask) and not kept.removed
    tensors = artifact.load(found.place).tensors
    (soft,) = [t for n, t in tensors.items() if n.endswith("soft")]
    assert bool((soft[~kept.spread()] == 0).all()) and bool((soft[kept.spread()] != 0).all())
    card = artifact.load(found.place).card
    assert card["pruned"]["kept"] == pruned.kept and card["pruned"]["numbers"] == 192
    read_out = sum(t.numel() for n, t in tensors.items() if not n.endswith("soft"))
    assert card["parameters"] == pruned.kept + read_out
    assert card["scores"]["test"] == pruned.test and card["pruned"]["from"] == "mood"
    assert found.record["parameters"] == pruned.kept and len(found.record["extra"]["scores"]["tokens"]) == 6
    assert files.read_bytes(found.figure)[:4] == b"\x89PNG"
    assert files.read_json(tmp_path / "out" / "pruned.json")["cost"] == found.cost
    assert str(tmp_path) not in str(found.record)


def test_controls_do_not_change_what_is_pruned(
    models: dict[str, Backbone], mood: dict[str, str], tmp_path: Path
) -> None:
    alone = prune(mood["llama"], tmp_path / "a", settings(controls=[]), show=False, backbone=models["llama"])
    beside = prune(mood["llama"], tmp_path / "b", settings(plain=1), show=False, backbone=models["llama"])
    assert named(alone)["retrained: pruned"] == named(beside)["retrained: pruned"]
    one, other = (table_of(f.place, models["llama"]).rows() for f in (alone, beside))
    torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_nine_and_nine_ratios_cost_less_than_three_trainings(
    models: dict[str, Backbone], mood: dict[str, str], tmp_path: Path
) -> None:
    """Counted in passes over rows; one after another in full they would cost eighteen."""
    found = prune(
        mood["llama"], tmp_path / "out", PruneTable.of({"prune": {"pieces": 16, "controls": []}}),
        overrides=["train.steps=36", "train.eval_every=4"], show=False, backbone=models["llama"],
    )  # fmt: skip
    cost = found.cost
    assert cost["one plain training"] == {"steps": 36, "rows_trained": 108, "rows_scored": 108}
    for stage in ("tokens", "pieces"):  # 9 candidates x 4 steps x 3 rows; each scored once on 12
        assert {k: cost[stage][k] for k in ("steps", "rows_trained", "rows_scored", "of_plain")} == {
            "steps": 4, "rows_trained": 108, "rows_scored": 108, "of_plain": 1.0,
        }  # fmt: skip
    assert cost["scores"]["rows_trained"] == 12
    assert sum(cost[stage]["of_plain"] for stage in ("scores", "tokens", "pieces")) <= 3
    assert len([r for r in found.rows if r.stage in ("tokens", "pieces")]) == 18


def test_a_grid_and_removal(models: dict[str, Backbone], mood: dict[str, str], tmp_path: Path) -> None:
    asked = settings(search="grid", search_steps=1, removed=True, controls=["form", "restart"])
    found = prune(mood["bert"], tmp_path / "out", asked, show=False, backbone=models["bert"])
    tried = [(r.token_ratio, r.piece_ratio) for r in found.rows if r.stage == "grid"]
    assert tried == [(0.2, 0.25), (0.2, 0.5), (0.5, 0.25), (0.5, 0.5)]
    kept = table_of(found.place, models["bert"])
    whole = artifact.load(mood["bert"]).prompt(models["bert"])
    again = artifact.load(found.place).prompt(models["bert"])
    assert kept.removed and again.length == whole.length - (6 - kept.tokens)
    assert named(found)["control: zeroed"].kept == named(found)["retrained: pruned"].kept
    assert named(found)["control: restart"].tokens == 6


def test_tokens_of_a_prefix(models: dict[str, Backbone], tmp_path: Path) -> None:
    (one,) = tune(
        [recipe("llama", prompt={"kind": "prefix"})], tmp_path / "t", show=False, backbone=models["llama"]
    )
    with pytest.raises(PromptError, match=r"has no pieces: prune its tokens alone \(prune.pieces = 1\)"):
        prune(one.place, tmp_path / "p", show=False, backbone=models["llama"])
    asked = settings(pieces=1, removed=True, controls=["shorter"])
    found = prune(one.place, tmp_path / "p", asked, show=False, backbone=models["llama"])
    assert {r.stage for r in found.rows} == {"tokens", "untrained", "retrained", "control"}
    assert table_of(found.place, models["llama"]).length == named(found)["retrained: pruned"].tokens < 6


def test_a_run_goes_on_and_does_not_start_twice(
    models: dict[str, Backbone], mood: dict[str, str], tmp_path: Path
) -> None:
    def again(**more: Any) -> Pruned:
        return prune(mood["bert"], tmp_path / "out", settings(), show=False, backbone=models["bert"], **more)

    first = again()
    with pytest.raises(TrainingError, match="holds a run already: pass --resume"):
        again()
    shutil.rmtree(tmp_path / "out" / "retrained")
    resumed = again(resume=True)
    assert named(resumed) == named(first)
    assert torch.equal(*(table_of(f.place, models["bert"]).rows() for f in (resumed, again(overwrite=True))))
    with pytest.raises(StorageError, match="exists already"):
        shutil.copytree(tmp_path / "out" / "mood-pruned", tmp_path / "other" / "mood-pruned")
        prune(mood["bert"], tmp_path / "other", settings(), show=False, backbone=models["bert"])


# -- rewinding ------------------------------------------------------------------------------------------


def source_of(place: str, backbone: Backbone, **train: Any) -> Source:
    found = artifact.load(place)
    return Source("mood", found.prompt(backbone), recipe("bert", train=train), 0, Data(backbone))


def rows(prompt: Any) -> Tensor:
    return rows_within(prompt).rows()


def test_the_four_targets(models: dict[str, Backbone], mood: dict[str, str], tmp_path: Path) -> None:
    backbone, asked = models["bert"], settings(early=0.5)
    source = source_of(mood["bert"], backbone)
    assert target(source, asked, "trained") is None
    mask = torch.ones(6, 4, dtype=torch.bool)
    assert torch.equal(rows(source.masked(mask, False)), rows(source.prompt))

    start = make_prompt(prompt_choice(source.recipe), backbone, source.data.task(source.recipe).labels, 0)
    initial = target(source, asked, "initial")
    assert torch.equal(initial, rows(start))
    assert torch.equal(rows(source.masked(mask, False, initial)), initial)

    short = recipe("bert", name="short", train={"steps": 2, "eval_every": 2})
    (two,) = tune([short], tmp_path / "two", show=False, backbone=backbone)
    early = target(source, asked, "early")
    assert torch.equal(early, rows(two.prompt)) and not torch.equal(early, initial)

    fresh = target(source, asked, "fresh")
    limit = 0.5 * backbone.geometry.embedding_rms / 10
    assert bool((fresh.abs() <= limit).all()) and not torch.equal(fresh, initial)


def test_the_early_target_follows_the_schedule(models: dict[str, Backbone], mood: dict[str, str]) -> None:
    """Step 2 of 4 under a falling rate is not the end of a training of 2 steps."""
    constant, falling = (
        target(source_of(mood["bert"], models["bert"], schedule=s), settings(early=0.5), "early")
        for s in ("constant", "linear")
    )
    assert not torch.equal(constant, falling)


# -- misuse ---------------------------------------------------------------------------------------------


def test_a_prompt_of_another_backbone(
    models: dict[str, Backbone], mood: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="'mood' was trained on 'bert', this is 'llama'"):
        prune(mood["bert"], tmp_path, settings(), show=False, backbone=models["llama"])


def test_what_cannot_be_pruned(models: dict[str, Backbone], mood: dict[str, str], tmp_path: Path) -> None:
    backbone = models["llama"]
    found = prune(mood["llama"], tmp_path / "out", settings(controls=[]), show=False, backbone=backbone)
    with pytest.raises(PromptError, match="'mood-pruned' is pruned already: prune the one that it came from"):
        prune(found.place, tmp_path / "twice", settings(), show=False, backbone=backbone)
    with pytest.raises(PromptError, match="7 pieces do not divide a row of 32 numbers"):
        prune(mood["llama"], tmp_path / "seven", settings(pieces=7), show=False, backbone=backbone)
    artifact.save(
        tmp_path / "foreign", prompt=InputPrompt(backbone.geometry, 3), backbone=backbone, name="foreign",
        task={"kind": "text", "input": "{text}"},
    )  # fmt: skip
    with pytest.raises(ArtifactError, match="names no recipe, so there is no data"):
        prune(tmp_path / "foreign", tmp_path / "none", settings(), show=False, backbone=backbone)


def test_a_card_runs_no_code(mood: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def load(chosen: Recipe) -> Backbone:
        asked.append(chosen.backbone.trust_code)
        raise BackboneError("stopped here")

    monkeypatch.setattr(pruned, "load_backbone", load)
    shutil.copytree(mood["llama"], tmp_path / "theirs")
    card = files.read_json(tmp_path / "theirs" / artifact.CARD)
    card["recipe"]["backbone"]["trust_code"] = True
    files.write_json(tmp_path / "theirs" / artifact.CARD, card)
    for overrides in ([], ["backbone.trust_code=true"]):  # the second is the caller's own choice
        with pytest.raises(BackboneError, match="stopped here"):
            prune(tmp_path / "theirs", tmp_path / "out", settings(), overrides=overrides, show=False)
    assert asked == [False, True]


def test_a_task_without_a_validation_split(models: dict[str, Backbone], tmp_path: Path) -> None:
    lines = [{"text": f"film {n}", "label": "good" if n % 2 else "bad"} for n in range(6)]
    for line in lines:
        files.append_jsonl(tmp_path / "train.jsonl", line)
    task = {"name": "t", "kind": "classification", "input": "{text}", "labels": ["bad", "good"],
            "train": str(tmp_path / "train.jsonl")}  # fmt: skip
    (one,) = tune([recipe("llama", task=task)], tmp_path / "t", show=False, backbone=models["llama"])
    with pytest.raises(RecipeError, match="chosen on validation, which the task 't' lacks"):
        prune(one.place, tmp_path / "p", settings(), show=False, backbone=models["llama"])


def test_all_problems_of_the_settings_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        PruneTable.of(
            {
                "prune": {
                    "token_ratios": [0.5, 1.0],
                    "piece_ratios": [],
                    "rewnd": 1,
                    "early": 0,
                    "rewind": "start",
                }
            },
            ["prune.draws=0"],
        )
    said = str(caught.value)
    for words in (
        "the settings: 5 problems",
        "prune.token_ratios.1: needs a number below 1",
        "prune.rewnd: unknown key; did you mean 'rewind'?",
        "prune.early: needs a number above 0",
        'prune.rewind: needs one of "trained"',
        "prune.draws: needs a whole number from 1",
    ):
        assert words in said, said
    with pytest.raises(RecipeError, match="prone: unknown key; did you mean 'prune'"):
        PruneTable.of({"prone": {}})
    with pytest.raises(
        RecipeError, match=r"prune.piece_ratios: needs a ratio; got \[\]; \[0\] prunes nothing"
    ):
        PruneTable.of({"prune": {"piece_ratios": []}})
