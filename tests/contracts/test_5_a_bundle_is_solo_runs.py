"""K prompts trained and scored together end where each ends alone, whatever their tasks, lengths, rates and seeds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from incipit import artifact
from incipit.backbones import tiny, wrap
from incipit.evaluation import DecodeOptions, Trial, evaluate, evaluate_all
from incipit.recipe import Recipe
from incipit.run import Tuned, tune
from incipit.tasks.task import builtin

REVIEWS = {"builtin": "reviews", "limit": 12}
QUESTIONS = {"builtin": "questions", "limit": 10}
ITEMS = {"builtin": "items", "limit": 6}


def recipe(
    name: str, family: str, task: dict[str, Any], seeds: list[int], length: int, **more: Any
) -> Recipe:
    train = {"steps": 6, "batch": 3, "eval_every": 2, "seeds": seeds} | more.pop("train", {})
    return Recipe.of(
        {
            "name": name,
            "backbone": {"name": f"tiny:{family}", "device": "cpu"},
            "prompt": {"length": length, **more},
            "task": task,
            "train": train,
            "decode": {"max_new_tokens": 2},
        }
    )


def unlike(family: str) -> list[Recipe]:
    """Recipes of different tasks, lengths, starts, rates, dev splits and seeds."""
    found = [
        recipe("mood", family, REVIEWS, [0, 3], 8, train={"lr": 0.2}),
        recipe("desk", family, QUESTIONS, [1], 6, train={"lr": 0.05}),
        recipe("slow", family, REVIEWS, [0], 3, start="vocabulary", train={"lr": 0.01, "eval_limit": 7}),
        recipe(
            "wide",
            family,
            QUESTIONS,
            [2],
            20,
            start="uniform",
            reparametrise="mlp",
            hidden=8,
            train={"lr": 0.02},
        ),
    ]
    if family != "bert":
        found.append(recipe("items", family, ITEMS, [5], 1, train={"lr_absolute": 0.01}))
    return found


def alike(one: Tuned, alone: Tuned) -> None:
    assert (one.name, one.outcome.steps, one.outcome.best_step) == (
        alone.name,
        alone.outcome.steps,
        alone.outcome.best_step,
    )
    there, here = artifact.load(alone.place).tensors, artifact.load(one.place).tensors
    for key, tensor in there.items():
        torch.testing.assert_close(here[key], tensor, rtol=0, atol=2e-5)
    assert one.outcome.history == alone.outcome.history  # dev scores of a mixed batch are those of each alone
    assert one.scores == alone.scores


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_a_bundle_ends_where_solo_runs_end(tmp_path: Path, family: str) -> None:
    backbone = wrap(family, *tiny.build(family))
    recipes = unlike(family)
    together = tune(recipes, tmp_path / "all", show=False, backbone=backbone)
    assert (tmp_path / "all" / "checkpoint.safetensors").exists(), "one run holds them all"
    names = ["mood-s0", "mood-s3", "desk", "slow", "wide", "items"]
    assert [one.name for one in together] == names[: len(recipes) + 1]
    bundled = {one.name: one for one in together}
    for one in recipes:
        for seed in one.train.seeds:
            table = one.table()
            name = one.name if len(one.train.seeds) == 1 else f"{one.name}-s{seed}"
            solo = Recipe.of(table | {"name": name, "train": table["train"] | {"seeds": [seed]}})
            (alone,) = tune([solo], tmp_path / name, show=False, backbone=backbone)
            alike(bundled[name], alone)


def test_prompts_of_keys_and_values_too(tmp_path: Path) -> None:
    backbone = wrap("llama", *tiny.build("llama"))
    recipes = [
        recipe("mood", "llama", REVIEWS, [0], 4, kind="prefix", train={"lr": 0.2}),
        recipe("desk", "llama", QUESTIONS, [1], 9, kind="prefix", train={"lr": 0.1}),
    ]
    together = tune(recipes, tmp_path / "all", show=False, backbone=backbone)
    for one, chosen in zip(together, recipes, strict=True):
        alike(one, tune([chosen], tmp_path / one.name, show=False, backbone=backbone)[0])


def test_patience_ends_one_member_and_the_others_go_on(tmp_path: Path) -> None:
    backbone = wrap("llama", *tiny.build("llama"))
    recipes = [
        recipe("still", "llama", REVIEWS, [0], 4, train={"lr": 1e-9, "patience": 2, "eval_every": 1}),
        recipe("moved", "llama", QUESTIONS, [1], 6, train={"lr": 0.3, "patience": 2, "eval_every": 1}),
    ]
    together = tune(recipes, tmp_path / "all", show=False, backbone=backbone)
    assert together[0].outcome.steps == 3  # the score of step 1 is never beaten
    for one, chosen in zip(together, recipes, strict=True):
        alike(one, tune([chosen], tmp_path / one.name, show=False, backbone=backbone)[0])


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_one_mixed_evaluation_is_an_evaluation_of_each(tmp_path: Path, family: str) -> None:
    backbone = wrap(family, *tiny.build(family))
    tuned = tune(unlike(family), tmp_path, show=False, backbone=backbone)
    trials = []
    for n, one in enumerate(tuned):
        task = builtin(one.record["settings"]["task"]["builtin"], limit=5 + n)
        metrics = [*task.metrics, *(["perplexity"] if family != "bert" and n % 2 else [])]
        options = DecodeOptions(mode="generate" if task.name == "items" else "auto", batch=4 + n % 2)
        trials.append(Trial(one.prompt, task.test, metrics, options))
    for trial, mixed in zip(trials, evaluate_all(backbone, trials, legality=True), strict=True):
        alone = evaluate(backbone, trial.prompt, trial.examples, trial.metrics, trial.options, legality=True)
        assert mixed.scores == pytest.approx(alone.scores, rel=1e-5)
        assert [p.text for p in mixed.predictions] == [p.text for p in alone.predictions]
        for a, b in zip(mixed.predictions, alone.predictions, strict=True):
            assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)
