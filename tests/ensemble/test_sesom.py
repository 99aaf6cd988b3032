"""The gate against its formula written out; it learns whom to trust where the input tells, and not when shuffled."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from incipit import artifact, ensemble, files
from incipit.artifact import Artifact
from incipit.backbones import Backbone
from incipit.batch import collate
from incipit.decode import stacked
from incipit.encode import question
from incipit.ensemble import (
    Cached,
    Ensemble,
    Gate,
    GateSettings,
    controls,
    fit_gates,
    from_answers,
    from_vocabulary,
)
from incipit.errors import ArtifactError, DataError, PromptError, RecipeError
from incipit.recipe import Recipe
from incipit.run import learn
from incipit.run.learned import adapt, folds_of
from incipit.tasks.example import Example

from .conftest import FORM, Shelf, examples, made_prompt

Of = Callable[[str], Backbone]


def test_the_gate_is_the_formula() -> None:
    settings = GateSettings(inner=3, width=4, seed=5)
    gate = Gate(settings, hidden=6, outputs=2, sources=3)
    x, scores = torch.randn(5, 6), torch.randn(5, 3, 2)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def projected(vector: torch.Tensor, part: Any) -> torch.Tensor:
        down, up, norm = part[0].weight, part[2].weight, part[3]
        hidden = down @ vector
        out = up @ (hidden * hidden.sigmoid())
        out = (out - out.mean()) / (out.var(unbiased=False) + norm.eps).sqrt()
        return norm.weight * out + norm.bias

    found = gate(x, scores)
    for i in range(5):
        h = projected(x[i], gate.input)
        logits = torch.stack([h @ projected(scores[i, j], gate.output) for j in range(3)])
        torch.testing.assert_close(found[i], (logits / (math.e * 4)).softmax(dim=0))
    # d d'_x + d'_x d' + v d'_l + d'_l d' + 4 d': two norms, no linear biases
    assert sum(p.numel() for p in gate.parameters()) == 6 * 3 + 3 * 4 + 2 * 3 + 3 * 4 + 4 * 4


def test_it_starts_near_the_uniform_mixture() -> None:
    gate = Gate(GateSettings(), hidden=16, outputs=3, sources=4)
    weights = gate(torch.randn(50, 16), torch.randn(50, 4, 3)).detach()
    assert float(weights.max() / weights.min()) < math.exp(2 / math.e)
    fixed = Gate(GateSettings("fixed"), hidden=16, outputs=3, sources=4)
    assert torch.equal(fixed(torch.randn(2, 16), torch.randn(2, 4, 3)), torch.full((2, 4), 0.25))


def two_experts(count: int, seed: int) -> Cached:
    """Source 0 is right where the first coordinate of the input is positive, source 1 where it is not.

    Source 0 is the surer one: the projection of what they say is shared, so a gate knows sources by their scores alone.
    """
    source = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=source)
    choice = torch.randint(2, (count,), generator=source)
    sign = 2.0 * torch.nn.functional.one_hot(choice, 2) - 1  # [B, C]
    right = torch.stack([inputs[:, 0] > 0, inputs[:, 0] <= 0], dim=1)  # [B, K]
    margin = torch.tensor([2.0, 1.0])[:, None]  # of each source
    scores = torch.where(right[:, :, None], sign[:, None], -sign[:, None]) * margin  # [B, K, C]
    return Cached(inputs, scores.log_softmax(dim=2), torch.arange(2).expand(count, 2), choice)


def test_it_learns_whom_to_trust_for_each_sample() -> None:
    shots, test = two_experts(64, 0), two_experts(200, 1)
    settings = [GateSettings(), GateSettings("fixed")]
    (gate, outcome), (fixed, _) = fit_gates(settings, shots, two_experts(64, 2), steps=100)
    told = controls(gate, test)
    assert outcome.best_score is not None and outcome.best_score > 0.85 and told["sesom"] > 0.85
    assert 0 <= told["entropy"] < math.log(2)
    # where the pairing is broken, what is left is chance; a fixed mixture cannot do better
    assert told["inputs_shuffled"] < 0.65 and told["mean_weights"] < 0.65
    assert controls(fixed, test)["sesom"] < 0.65


def test_a_bundle_of_gates_is_each_alone() -> None:
    shots = two_experts(16, 0)
    settings = [GateSettings(seed=0, tau=4.0), GateSettings(seed=1, tau=4.0)]
    together = fit_gates(settings, shots, steps=5)
    for one, (gate, _) in zip(settings, together, strict=True):
        ((alone, _),) = fit_gates([one], shots, steps=5)
        for a, b in zip(gate.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_what_a_gate_reads(backbones: Of) -> None:
    backbone, asked = backbones("t5"), examples()
    prompts = [made_prompt(backbone, seed) for seed in range(2)]
    settings = GateSettings(log_probabilities=False)
    answers = ensemble.ask(backbone, prompts, asked)
    words = from_answers(backbone, answers, asked, settings)
    assert words.scores.shape == (6, 2, 3) and answers.scores is not None
    assert words.scores[4, 1].tolist() == pytest.approx(answers.scores[1][4])
    ids = question(backbone, asked[2]).input_ids
    torch.testing.assert_close(words.inputs[2], backbone.embed(ids).amax(dim=0))
    mean = from_answers(backbone, answers, asked, GateSettings(pool="mean")).inputs[2]
    torch.testing.assert_close(mean, backbone.embed(ids).mean(dim=0))

    pieces = from_vocabulary(backbone, prompts, asked, settings, batch=5)
    assert pieces.scores.shape == (6, 2, backbone.geometry.vocab)
    batch = collate([question(backbone, asked[3])], [0], pad_id=backbone.pad_id)
    alone = backbone.next_token(batch, stacked([prompts[1]], batch.rows))  # type: ignore[attr-defined]
    torch.testing.assert_close(pieces.scores[3, 1], alone[0], rtol=1e-4, atol=1e-4)
    firsts = [question(backbone, asked[0], answer=w).target_ids[0] for w in asked[0].choices]
    assert pieces.words[0].tolist() == firsts
    half = torch.full((6, 2), 0.5)
    torch.testing.assert_close(pieces.mixture(half), pieces.scores.mean(dim=1)[:, firsts])


def test_what_a_gate_cannot_read(backbones: Of) -> None:
    backbone = backbones("llama")
    prompts = [made_prompt(backbone, seed) for seed in range(2)]
    settings = GateSettings()
    written = examples(())
    with pytest.raises(DataError, match="mixes the scores of label words, and this task has none"):
        from_vocabulary(backbone, prompts, written, settings, 8)
    other = [*examples(), Example("x", "red", ("red", "blue"), 0)]
    with pytest.raises(DataError, match="each example of this task has its own choices"):
        from_vocabulary(backbone, prompts, other, settings, 8)
    same = examples(("good", "good film"))
    with pytest.raises(DataError, match="do not begin with different pieces"):
        from_vocabulary(backbone, prompts, same, settings, 8)
    encoder = backbones("bert")
    with pytest.raises(PromptError, match="an encoder has no vocabulary to write from"):
        from_vocabulary(encoder, [made_prompt(encoder, 0)], examples(), settings, 8)
    with pytest.raises(
        PromptError, match="unknown choice 'word' of an ensemble's gate; did you mean 'words'"
    ):
        GateSettings(space="word")
    with pytest.raises(PromptError, match="need a gate that was learned for these prompts"):
        Ensemble(tuple(prompts), "sesom")
    with pytest.raises(PromptError, match="a gate 'sesom' of 3 with the method 'sesom' of 2 prompts"):
        Ensemble(tuple(prompts), "sesom", gate=Gate(settings, 32, 3, 3))
    with pytest.raises(DataError, match="no shots to learn the weights from"):
        fit_gates([settings], two_experts(4, 0).select([]))


def target(backbone: Backbone, method: str = "sesom", **table: Any) -> Recipe:
    task = {
        "name": "mood", "kind": "classification", "input": "{text}", "labels": list(FORM["words"]),  # type: ignore[call-overload]
        "train": "shots.jsonl", "test": "shots.jsonl",
    }  # fmt: skip
    tables = {"name": "target", "backbone": {"name": backbone.name}, "task": task, "prompt": {"length": 4},
              "train": {"steps": 3, "batch": 2, "lr": 0.3},
              "ensemble": {"method": method, "steps": 4, "width": 8, "inner": 4} | table}  # fmt: skip
    if method == "fixed":
        tables["ensemble"] = {"method": method, "steps": 4} | table
    return Recipe.of(tables)


@pytest.fixture
def shots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": e.input, "label": e.target} for e in examples()]
    (tmp_path / "shots.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def members_of(backbone: Backbone, shelf: Shelf) -> list[Artifact]:
    return shelf(backbone, [made_prompt(backbone, seed) for seed in range(3)])


@pytest.mark.parametrize(
    ("family", "method", "more"),
    [
        ("bert", "sesom", {}),
        ("llama", "fixed", {}),
        ("t5", "sesom", {"space": "vocabulary"}),
        ("llama", "sesom", {"adapt": True, "folds": 3}),
        ("bert", "sesom", {"adapt": True}),
    ],
)
def test_learned_written_and_read_again(
    shots: Path, backbones: Of, shelf: Shelf, family: str, method: str, more: dict[str, Any]
) -> None:
    backbone = backbones(family)
    members = members_of(backbone, shelf)
    before = [m.prompt(backbone).state_dict() for m in members]
    done = learn(members, backbone, target(backbone, method, **more), place=shots / "e")
    assert set(done.controls) == {
        "sesom", "inputs_shuffled", "scores_shuffled", "mean_weights", "uniform", "entropy",
    }  # fmt: skip
    assert done.controls["sesom"] == pytest.approx(done.comparison.ensemble["accuracy"])
    saved = ensemble.load(shots / "e")
    adapted = bool(more.get("adapt"))
    assert [m.name for m in saved.members] == [f"{n}-on-target" if adapted else n for n in "abc"]
    for member, state in zip(saved.members, before, strict=True):
        same = all(torch.equal(member.tensors[k], state[k].cpu()) for k in member.tensors if "soft" in k)
        assert same != adapted, "sources move when they are adapted, and only then"
        assert not adapted or member.card["origin"]["method"] == "adapted"
    again = saved.ensemble(backbone).predict(backbone, examples(), mode="rank")
    direct = done.ensemble.predict(backbone, examples(), mode="rank")
    assert [p.text for p in again] == [p.text for p in direct]
    for a, b in zip(again, direct, strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-6)


def test_a_damaged_gate(shots: Path, backbones: Of, shelf: Shelf) -> None:
    backbone = backbones("bert")
    learn(members_of(backbone, shelf), backbone, target(backbone), place=shots / "e")
    path = shots / "e" / ensemble.saved.TENSORS
    tensors, _ = files.load_tensors(path)
    files.save_tensors(path, {n: t + 1 for n, t in tensors.items()}, {"format": "pt"})
    with pytest.raises(ArtifactError, match="does not have the hash that the card names"):
        ensemble.load(shots / "e")


def test_folds_leave_their_shots_out(backbones: Of) -> None:
    parts = folds_of(7, 3, seed=0)
    assert sorted(i for part in parts for i in part) == list(range(7))
    assert sorted(map(len, parts)) == [2, 2, 3] and parts != folds_of(7, 3, seed=1)
    with pytest.raises(DataError, match="9 folds of 7 shots leave some empty"):
        folds_of(7, 9, seed=0)
    backbone = backbones("llama")
    prompts = [made_prompt(backbone, seed) for seed in range(2)]
    asked = examples()
    subsets = [[0, 1, 2, 3, 4, 5], [0, 1, 2], [3, 4, 5]]
    recipe = target(backbone, adapt=True)
    together = adapt(prompts, backbone, recipe, asked, subsets)
    alone = adapt(prompts, backbone, recipe, asked[3:], [[0, 1, 2]])
    for a, b in zip(together[2], alone[0], strict=True):
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert not torch.equal(next(together[1][0].parameters()), next(together[2][0].parameters()))


def test_misuse(shots: Path, backbones: Of, shelf: Shelf) -> None:
    backbone = backbones("bert")
    members = members_of(backbone, shelf)
    other = replace(members[1], card={**members[1].card, "name": members[0].name})
    with pytest.raises(ArtifactError, match="are both named 'a', and what is made of each"):
        learn([members[0], other], backbone, target(backbone, adapt=True), place=shots / "e")
    (shots / "shots.jsonl").write_text("")
    with pytest.raises(DataError, match="shots"):
        learn(members, backbone, target(backbone))
    with pytest.raises(ArtifactError, match="give two or more artifacts"):
        learn(members[:1], backbone, target(backbone))
    with pytest.raises(RecipeError, match="is learned; write that table"):
        learn(members, backbone, target(backbone).model_copy(update={"ensemble": None}))


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"sources": ["a"]}, r"ensemble.sources: needs two artifacts or more; got \['a'\]"),
        ({"folds": 3}, "ensemble.folds: only ensemble.adapt = true reads it"),
        ({"adapt": True, "folds": 1}, "one fold leaves nothing to train on"),
        ({"method": "vote", "tau": 2.0}, 'ensemble.tau: only ensemble.method = "sesom" reads it'),
        ({"tua": 2.0}, "ensemble.tua: unknown key; did you mean 'tau'?"),
        ({"method": "sesam"}, "ensemble.method: needs one of"),
    ],
)
def test_what_an_ensemble_table_cannot_say(table: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says.replace("?", r"\?")):
        Recipe.of({"task": {"builtin": "reviews"}, "ensemble": table})
    assert "ensemble" not in Recipe.of({"task": {"builtin": "reviews"}}).table()


def test_an_artifact_says_where_it_came_from(shots: Path, backbones: Of, shelf: Shelf) -> None:
    backbone = backbones("llama")
    learn(members_of(backbone, shelf), backbone, target(backbone, adapt=True), place=shots / "e")
    saved = artifact.load(shots / "e-sources" / "a")
    assert saved.card["origin"] == {"method": "adapted", "members": {"a": artifact.load(shots / "a").digest}}
