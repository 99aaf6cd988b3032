"""Similarity, mixtures, shared parts, recycling and the pull, each against numbers that can be counted."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from incipit import artifact
from incipit.assemble import PromptChoice, make_prompt
from incipit.backbones import Backbone, GenerateOptions, tiny, wrap
from incipit.batch import collate
from incipit.decode import predict, stacked
from incipit.encode import encode, question
from incipit.errors import ArtifactError, DataError, PromptError, RecipeError
from incipit.prompts import InputPrompt, MultitaskPrompt, PrefixPrompt, Prompt
from incipit.recipe import Recipe
from incipit.run import tune
from incipit.tasks.example import Example
from incipit.train import FitSettings, OptimSettings
from incipit.transfer import (
    Attempt,
    Shared,
    fit_attempt,
    fit_shared,
    near,
    pairs,
    pulled,
    recycle,
    similarities,
    soft_rows,
)
from incipit.transfer.similarity import rows_of

WORDS = ("good", "bad")
EXAMPLES = [
    Example(t, WORDS[i % 2], WORDS, i % 2) for i, t in enumerate(("fine film", "dull", "a red car and a cat"))
]


@pytest.fixture(scope="module")
def backbones() -> dict[str, Backbone]:
    return {name: wrap(name, *tiny.build(name)) for name in ("llama", "t5", "bert", "qwen3")}


def made(backbone: Backbone, seed: int = 0, length: int = 4, **more: Any) -> Prompt:
    prompt = make_prompt(PromptChoice(length=length, start="vocabulary", **more), backbone, WORDS, seed)
    assert prompt is not None
    return prompt


# -- similarity ----------------------------------------------------------------------------------------------


def test_cosines_of_prompts() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    b = torch.tensor([[2.0, 2.0]])
    c = torch.tensor([[-1.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    average = similarities([a, b, c])
    assert average[0, 1] == pytest.approx(1.0) and average[0, 0] == pytest.approx(1.0)
    mean = torch.tensor([-1 / 3, 4 / 3])
    assert average[0, 2] == pytest.approx(float(F.cosine_similarity(a.mean(dim=0), mean, dim=0)))
    tokens = similarities([a, b, c], "tokens")
    pairs_of = [F.cosine_similarity(x, y, dim=0) for x in a for y in c]
    assert tokens[0, 2] == pytest.approx(float(sum(pairs_of)) / 6, abs=1e-6)
    assert tokens[0, 0] == pytest.approx(0.5) and tokens[0, 1] == pytest.approx(math.sqrt(0.5))
    with pytest.raises(PromptError, match="rows of 2, 3 numbers cannot be compared"):
        similarities([a, torch.ones(1, 3)])
    with pytest.raises(PromptError, match="unknown measure 'token'; did you mean 'tokens'"):
        similarities([a], "token")


def test_the_nearest_of_a_library(tmp_path: Path, backbones: dict[str, Backbone]) -> None:
    backbone = backbones["llama"]
    base = torch.randn(3, backbone.geometry.hidden)
    noise = torch.randn(3, backbone.geometry.hidden)

    def put(name: str, prompt: Prompt, model: Backbone = backbone) -> artifact.Artifact:
        form = {"name": name, "kind": "classification", "input": "{text}", "words": list(WORDS)}
        return artifact.load(
            artifact.save(tmp_path / name, prompt=prompt, backbone=model, name=name, task=form)
        )

    target = put("target", InputPrompt(backbone.geometry, 3, base))
    close = put("close", InputPrompt(backbone.geometry, 3, base + 0.1 * noise))
    far = put("far", InputPrompt(backbone.geometry, 3, -base))
    framed = put("framed", made(backbone))
    prefix = put("prefix", PrefixPrompt(backbone.geometry, 3))
    other = put("other", made(backbones["qwen3"]), backbones["qwen3"])
    library = [far, prefix, target, other, close, framed]
    found = near(target, library)
    assert [one.name for one, _ in found] == ["close", "framed", "far"]
    assert found[0][1] > 0.95 and found[-1][1] == pytest.approx(-1, abs=1e-5)
    torch.testing.assert_close(rows_of(framed), soft_rows(framed.prompt(backbone)))
    torch.testing.assert_close(rows_of(prefix), soft_rows(prefix.prompt(backbone)))
    with pytest.raises(ArtifactError, match="no other prompt of 'llama' to compare 'target' with"):
        near(target, [target, other])


# -- ATTEMPT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_the_mixture_is_the_formula(backbones: dict[str, Backbone], family: str) -> None:
    backbone = backbones[family]
    target, sources = made(backbone), [made(backbone, seed) for seed in (1, 2)]
    attempt = Attempt.of(target, sources, inner=5)
    tables = [soft_rows(p) for p in (*sources, target)]
    prompts = attempt.prompts(backbone, EXAMPLES)
    for example, prompt in zip(EXAMPLES, prompts, strict=True):
        x = backbone.embed(question(backbone, example).input_ids).float().amax(dim=0)
        inner = attempt.down.weight @ x
        h = F.layer_norm(attempt.up.weight @ (inner * inner.sigmoid()), (len(x),))
        scores = torch.stack([rows.amax(dim=0) @ h for rows in tables]) / (math.e * len(x))
        a = scores.softmax(dim=0)
        rows = tables[2] + sum(w * t for w, t in zip(a, tables, strict=True))
        torch.testing.assert_close(soft_rows(prompt), rows.detach(), rtol=1e-5, atol=1e-5)
    # a batch of K = B prompts, as in training, is each prompt alone, as in prediction
    encoded = [encode(backbone, e, room=attempt.length) for e in EXAMPLES]
    batch = collate(encoded, range(3), pad_id=backbone.pad_id)
    pooled = torch.stack([backbone.embed(e.input_ids).float().amax(dim=0) for e in encoded])
    together = backbone.loss(batch, attempt.injection(pooled))[0]
    alone = backbone.loss(batch, stacked(prompts, batch.rows))[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert [p.text for p in attempt.predict(backbone, EXAMPLES, batch=2)] == [
        predict(backbone, [prompt], [e])[0].text for prompt, e in zip(prompts, EXAMPLES, strict=True)
    ]


def test_the_mixture_is_chosen_by_what_is_read(backbones: dict[str, Backbone]) -> None:
    """Words that find no place beside the prompt weigh nothing, as in training."""
    backbone = backbones["bert"]
    attempt = Attempt.of(made(backbone), [made(backbone, seed) for seed in (1, 2)], inner=5)
    tail, room = "red", backbone.geometry.max_length - len(backbone.ending)
    fits = "a " * (
        room - len(backbone.text_ids(tail))
    )  # without the prompt's four rows all would find a place
    one, other = attempt.prompts(backbone, [Example(fits + end, "good", WORDS, 0) for end in ("", tail)])
    torch.testing.assert_close(soft_rows(one), soft_rows(other), rtol=0, atol=0)


def test_attempt_trains_its_own_numbers_alone(tmp_path: Path, backbones: dict[str, Backbone]) -> None:
    backbone = backbones["bert"]
    attempt = Attempt.of(made(backbone), [made(backbone, 1), made(backbone, 2)], inner=4)
    before = {n: t.clone() for n, t in attempt.state_dict().items()}
    settings = FitSettings(steps=4, batch=3, show=False, eval_every=2, optim=OptimSettings(lr=0.1))

    def dev(one: Attempt) -> dict[str, float]:
        said = one.predict(backbone, EXAMPLES)
        return {"accuracy": sum(p.text == e.target for p, e in zip(said, EXAMPLES, strict=True)) / 3}

    outcome = fit_attempt(backbone, attempt, EXAMPLES, settings, tmp_path / "run", gate_lr=0.01, dev=dev)
    moved = {n for n, t in attempt.state_dict().items() if not torch.equal(t, before[n])}
    assert outcome.steps == 4 and outcome.best_score is not None
    assert moved == {n for n, p in attempt.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in moved} == {"target", "down", "up", "norm"} and "sources" not in moved
    with pytest.raises(PromptError, match="every source needs the target's shape"):
        Attempt.of(made(backbone), [made(backbone, length=3)])
    with pytest.raises(PromptError, match='give a target of kind "input"'):
        Attempt(PrefixPrompt(backbone.geometry, 2), [torch.zeros(2, 32)])


# -- shared parts --------------------------------------------------------------------------------------------

HOWS = {"add": 0, "concat": 2, "features": 8, "project": 6, "low_rank": 2}


@pytest.mark.parametrize("how", HOWS)
def test_every_task_starts_at_the_given_rows(backbones: dict[str, Backbone], how: str) -> None:
    geometry = backbones["llama"].geometry
    rows = torch.randn(5, geometry.hidden)
    one = MultitaskPrompt(geometry, how, 5, HOWS[how], rows)
    torch.testing.assert_close(one.rows().detach(), rows, rtol=1e-4, atol=1e-5)
    two = one.sibling()
    torch.testing.assert_close(two.rows().detach(), rows, rtol=1e-4, atol=1e-5)
    assert two.shared is one.shared and not set(two.own.parameters()) & set(one.own.parameters())
    two.rows().square().sum().backward()
    assert one.shared.grad is not None and all(p.grad is None for p in one.own.parameters())
    with torch.no_grad():
        for parameter in one.own.values():
            parameter.add_(1.0)
    assert not torch.allclose(one.rows(), two.rows())


def test_what_each_way_computes(backbones: dict[str, Backbone]) -> None:
    geometry = backbones["llama"].geometry
    ones, h = torch.ones(2, geometry.hidden), geometry.hidden
    made_ = {
        how: MultitaskPrompt(geometry, how, 2, {"concat": 1, "features": 1}.get(how, 0), ones) for how in HOWS
    }
    with torch.no_grad():
        made_["add"].own["rows"].fill_(2)
        made_["concat"].own["rows"].fill_(5)
        made_["features"].own["rows"].fill_(7)
        made_["low_rank"].own["left"].copy_(torch.tensor([[2.0], [3.0]]))
        made_["project"].own["kernel"].copy_(2 * torch.eye(h))
        made_["project"].shared.copy_(ones)
        made_["project"].own["bias"].fill_(1)
    assert torch.equal(made_["add"].rows(), 3 * ones)
    assert made_["concat"].rows()[:, 0].tolist() == [1, 5]
    assert made_["features"].rows()[0].tolist() == [1] * (h - 1) + [7]
    assert made_["low_rank"].rows()[:, 0].tolist() == [2, 3]
    assert torch.equal(made_["project"].rows(), 3 * ones)
    for how, part in (("concat", 2), ("features", h), ("low_rank", 3), ("add", 1)):
        with pytest.raises(PromptError, match=f'part {part} of a "{how}" prompt of 2 rows'):
            MultitaskPrompt(geometry, how, 2, part)
    with pytest.raises(PromptError, match=r"unknown way 'lowrank'.*did you mean 'low_rank'"):
        MultitaskPrompt(geometry, "lowrank", 2)


def test_tasks_are_trained_around_one_part(tmp_path: Path, backbones: dict[str, Backbone]) -> None:
    backbone = backbones["t5"]
    start = backbone.embed(backbone.frequent_ids(4)).detach()
    first = MultitaskPrompt(backbone.geometry, "low_rank", 4, 1, start)
    second = first.sibling()
    other = [Example(e.input, "no", ("yes", "no"), 1) for e in EXAMPLES]
    tasks = [Shared("a", first, EXAMPLES, EXAMPLES), Shared("b", second, other, other)]
    settings = FitSettings(steps=20, batch=4, show=False, eval_every=10, optim=OptimSettings(lr=0.1))
    encoded = [encode(backbone, e, room=4) for e in other]
    batch = collate(encoded, pad_id=backbone.pad_id)
    before = float(backbone.loss(batch, second.injection())[0].mean().detach())
    outcome = fit_shared(backbone, tasks, settings, tmp_path / "run")
    assert set(outcome.scores) == {"mean", "a", "b"}
    assert first.shared is second.shared and not torch.allclose(first.shared, start)
    assert not torch.allclose(first.rows(), second.rows())
    # what was trained is what answers: the prompt, baked and through the decoder, gives the trained loss
    trained = backbone.loss(batch, second.injection())[0].detach()
    baked = backbone.loss(batch, second.bake().injection())[0].detach()
    torch.testing.assert_close(trained, baked)
    said = predict(backbone, [second], other)
    assert [p.text for p in said] == [p.text for p in predict(backbone, [second.bake()], other)]
    assert float(trained.mean()) < before, "the task of one answer was learned"
    with pytest.raises(PromptError, match="no two of these prompts share a part"):
        alone = MultitaskPrompt(backbone.geometry, "add", 4)
        fit_shared(backbone, [tasks[0], Shared("c", alone, other)], settings, tmp_path / "c")
    with pytest.raises(DataError, match="names of their own"):
        fit_shared(backbone, [tasks[0], tasks[0]], settings, tmp_path / "d")
    with pytest.raises(DataError, match="'a' is scored by perplexity"):
        unread = [replace(tasks[0], metric="perplexity"), tasks[1]]
        fit_shared(backbone, unread, settings, tmp_path / "e")


def test_a_step_is_chosen_by_answers_made_as_asked(tmp_path: Path, backbones: dict[str, Backbone]) -> None:
    """Ranked, one of two answers to a text is right; written, a model that knows nothing never hits a word."""
    backbone = backbones["t5"]
    start = backbone.embed(backbone.frequent_ids(4)).detach()
    both = [Example("a red car", word, WORDS, i) for i, word in enumerate(WORDS)]
    scores = {}
    for mode in ("rank", "generate"):
        prompt = MultitaskPrompt(backbone.geometry, "low_rank", 4, 1, start)
        task = Shared("a", prompt, EXAMPLES, both * 4, "accuracy", mode, GenerateOptions(2), 3)
        settings = FitSettings(steps=1, batch=4, show=False, eval_every=1, optim=OptimSettings(lr=0.0001))
        scores[mode] = fit_shared(backbone, [task], settings, tmp_path / mode).scores["a"]
    assert scores == {"rank": 0.5, "generate": 0.0}


# -- another backbone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "combination", "neural"])
def test_the_way_there_is_found(backbones: dict[str, Backbone], method: str) -> None:
    """Between a backbone and a copy whose embeddings are a rotation of its own, a prompt is carried over exactly."""
    source = backbones["llama"]
    model, tokenizer = tiny.build("llama")
    turn = torch.linalg.qr(torch.randn(32, 32)).Q
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(source.table.weight @ turn)
    target = wrap("turned", model, tokenizer)
    rows = source.embed(source.frequent_ids(3)).detach() + 0.1 * torch.randn(3, 32)
    there = recycle(rows, source, target, method)
    if method == "neural":  # 25 epochs of a network come near, and nearer than no network
        assert (there - rows @ turn).norm() < 0.9 * (rows @ turn).norm()
    else:
        torch.testing.assert_close(there, rows @ turn, rtol=1e-3, atol=1e-3)


def test_pairs_are_the_same_words(backbones: dict[str, Backbone]) -> None:
    source, target = backbones["llama"], backbones["t5"]
    there, here = pairs(source, target, count=20)
    assert len(there) == len(here) == 20
    assert [source.piece(i) for i in there] == [target.piece(i) for i in here]
    assert recycle(torch.randn(2, 32), source, target).shape == (2, target.geometry.hidden)
    with pytest.raises(PromptError, match="unknown way to recycle a prompt 'linaer'; did you mean 'linear'"):
        recycle(torch.randn(2, 32), source, target, "linaer")
    with pytest.raises(PromptError, match="rows of 8 numbers are not of backbone 'llama'"):
        recycle(torch.randn(2, 8), source, target)


# -- the pull ------------------------------------------------------------------------------------------------


def test_the_pull_is_added_once_a_token(backbones: dict[str, Backbone]) -> None:
    backbone = backbones["llama"]
    rms = backbone.geometry.embedding_rms
    text = backbone.embed(backbone.frequent_ids(2)).detach()
    prompts = [InputPrompt(backbone.geometry, 2, text + rms), InputPrompt(backbone.geometry, 2, text)]
    encoded = [encode(backbone, e, room=2) for e in EXAMPLES]
    batch = collate(encoded, [0, 1, 0], pad_id=backbone.pad_id)

    def plain(one: Any) -> Any:
        return backbone.loss(one, stacked(prompts, one.rows))

    nll, count = plain(batch)
    total, same = pulled(plain, prompts, [text, None], [0.5, 0.0])(batch)
    assert torch.equal(count, same)
    # every coordinate of prompt 0 is one RMS away: sum over 2 x H of 1, over P = 2, is H
    added = 0.5 * backbone.geometry.hidden * count
    torch.testing.assert_close(total[[0, 2]], (nll + added)[[0, 2]])
    assert torch.equal(total[1], nll[1])
    (total.sum() / count.sum()).backward()
    pull = prompts[0].soft.grad
    assert pull is not None and bool(torch.isfinite(pull).all())
    with pytest.raises(PromptError, match="give an anchor of its shape, or gamma 0"):
        pulled(plain, prompts, [text[:1], None], [0.5, 0.0])


def test_a_recipe_pulls(tmp_path: Path, backbones: dict[str, Backbone]) -> None:
    table = {
        "name": "far", "backbone": {"name": "bert"}, "task": {"builtin": "reviews", "limit": 8},
        "prompt": {"length": 2, "start": "text", "text": "good film"},
        "train": {"steps": 4, "batch": 2, "lr": 0.3, "keep": 0},
    }  # fmt: skip
    table["train"].pop("keep")  # type: ignore[attr-defined]
    free = Recipe.of(table)
    held = Recipe.of(table | {"name": "near", "train": table["train"] | {"wayward": 50.0}})  # type: ignore[operator]
    backbone = backbones["bert"]
    moved = []
    for recipe in (free, held):
        (tuned,) = tune([recipe], tmp_path / recipe.name, show=False, backbone=backbone)
        (tensor,) = [t for n, t in artifact.load(tuned.place).tensors.items() if n.endswith("soft")]
        text = backbone.embed([i for i in backbone.text_ids("good film")][:2]).detach()
        moved.append(float((tensor - text).norm()))
    assert 0 < moved[1] < moved[0]
    with pytest.raises(
        RecipeError, match=r"train.wayward: pulls soft rows to the text they start from; got 50.0"
    ):
        Recipe.of({"task": {"builtin": "reviews"}, "train": {"wayward": 50.0}})
    assert "wayward" not in free.table()["train"]
