"""K prompts in one batch say what K passes say; votes, mixtures and averages by numbers that a reader can count."""

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from incipit.backbones import Backbone, tiny, wrap
from incipit.decode import Prediction, Prefixes, predict, score_all
from incipit.ensemble import Answers, Ensemble, ask, averaged, compare, mixed, oracle, vote
from incipit.errors import PromptError
from incipit.prompts import InputPrompt, PrefixPrompt
from incipit.tasks.example import Example

from .conftest import examples, made_prompt

Of = Callable[[str], Backbone]
ABC = ("a", "b", "c")


def ranked(*shares: float) -> Prediction:
    best = max(range(len(shares)), key=shares.__getitem__)
    return Prediction(ABC[best], best, dict(zip(ABC, shares, strict=False)))


def one(choices: tuple[str, ...] = ABC, target: str = "a") -> list[Example]:
    return [Example("x", target, choices, choices.index(target) if choices else None)]


def voted(*cast: Prediction, choices: tuple[str, ...] = ABC) -> Prediction:
    return vote(Answers([[p] for p in cast], None), one(choices))[0]


def test_the_majority_wins_however_sure_the_others_are() -> None:
    found = voted(ranked(0.99, 0.01, 0.0), ranked(0.4, 0.6, 0.0), ranked(0.4, 0.6, 0.0))
    assert (found.text, found.choice) == ("b", 1)
    assert found.probabilities == pytest.approx({"a": 1 / 3, "b": 2 / 3, "c": 0.0})


def test_a_tie_goes_to_the_greater_summed_probability() -> None:
    # one vote each for a, b and c; sums over all three: a 1.0, b 1.1, c 0.9
    assert voted(ranked(0.5, 0.3, 0.2), ranked(0.2, 0.6, 0.2), ranked(0.3, 0.2, 0.5)).text == "b"
    # c has the greatest sum and no vote: it is not in the tie of a and b
    assert voted(ranked(0.5, 0.05, 0.45), ranked(0.05, 0.5, 0.45)).text == "a"
    assert voted(ranked(0.1, 0.6, 0.3), ranked(0.6, 0.1, 0.3)).text == "a", "equal sums: the first choice"


def test_written_answers_are_counted_as_texts() -> None:
    written = [Prediction(text) for text in ("in Rome", " in Paris", "in Paris ")]
    assert voted(*written, choices=()).text == "in Paris"
    assert voted(Prediction("x"), Prediction("y"), choices=()).text == "x", "a tie: the first prompt"
    assert voted(Prediction("z"), Prediction("z"), ranked(1.0, 0.0, 0.0)) == Prediction("z"), "no label word"


def test_a_mixture_is_a_weighted_sum_of_scores() -> None:
    scores = [[[2.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]]
    answers = Answers([[ranked(0.8, 0.1, 0.1)], [ranked(0.2, 0.6, 0.2)]], scores)
    (found,) = mixed(answers, one(), [0.5, 0.5])
    total = math.exp(1.0) + math.exp(0.5) + 1
    assert found.probabilities == pytest.approx(
        {"a": math.e / total, "b": math.exp(0.5) / total, "c": 1 / total}
    )
    (found,) = mixed(answers, one(), [[0.1, 0.9]])  # of this sample: 0.2, 0.9, 0
    assert found.text == "b"
    with pytest.raises(PromptError, match="3 weights for 2 prompts"):
        mixed(answers, one(), [1.0, 1.0, 1.0])
    with pytest.raises(PromptError, match='these answers are free text: use the method "vote"'):
        mixed(Answers(answers.predictions, None), one(), [0.5, 0.5])


def test_the_oracle_is_right_where_any_is() -> None:
    cast = [[ranked(1, 0, 0), ranked(1, 0, 0)], [ranked(0, 1, 0), ranked(0, 0, 1)]]
    asked = [*one(target="b"), *one(target="b")]
    assert [p.text for p in oracle(Answers(cast, None), asked)] == ["b", "a"]


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_one_batch_is_k_separate_passes(family: str) -> None:
    model, tokenizer = tiny.build(family)
    backbone, asked = (
        wrap(family, model.double(), tokenizer),
        examples(),
    )  # rounding left out, the passes compare
    prompts = [made_prompt(backbone, seed, length) for seed, length in ((0, 4), (1, 4), (2, 7))]
    together = ask(backbone, prompts, asked, batch=5)
    assert together.scores is not None
    for k, prompt in enumerate(prompts):
        alone = predict(backbone, [prompt], asked)
        assert [p.text for p in together.predictions[k]] == [p.text for p in alone]
        for a, b in zip(together.predictions[k], alone, strict=True):
            assert a.probabilities == pytest.approx(b.probabilities, abs=1e-6)
        (own,) = score_all(backbone, [prompt], asked)
        torch.testing.assert_close(torch.tensor(together.scores[k]), torch.tensor(own), rtol=1e-5, atol=1e-5)
    texts = {tuple(p.text for p in own) for own in together.predictions}
    assert len(texts) > 1, "prompts that all say the same would prove nothing"


def test_written_answers_of_k_prompts(backbones: Of) -> None:
    backbone, asked = backbones("llama"), examples(())
    prompts = [made_prompt(backbone, seed) for seed in range(3)]
    found = Ensemble(tuple(prompts)).predict(backbone, asked)
    each = [[p.text for p in predict(backbone, [prompt], asked)] for prompt in prompts]
    for i, answer in enumerate(found):
        texts = [own[i].strip() for own in each]
        assert texts.count(answer.text) == max(map(texts.count, texts))


def test_the_average_of_prompts(backbones: Of) -> None:
    geometry = backbones("llama").geometry
    rows = [torch.full((2, geometry.hidden), value) for value in (1.0, 2.0, 6.0)]
    mean = averaged([InputPrompt(geometry, 2, row) for row in rows])
    assert torch.equal(mean.rows(), torch.full((2, geometry.hidden), 3.0))  # type: ignore[attr-defined]
    for other in (InputPrompt(geometry, 3), PrefixPrompt(geometry, 2)):
        with pytest.raises(PromptError, match="prompt 1 has another form than prompt 0"):
            averaged([InputPrompt(geometry, 2), other])


def test_mean_best_ensemble_and_oracle(backbones: Of) -> None:
    backbone, asked = backbones("llama"), examples()
    prompts = tuple(made_prompt(backbone, seed) for seed in range(3))
    found = compare(backbone, Ensemble(prompts, "logits"), asked, ["accuracy"])
    each = [m["accuracy"] for m in found.members]
    alone = [predict(backbone, [prompt], asked) for prompt in prompts]
    assert each == [sum(p.text == e.target for p, e in zip(own, asked, strict=True)) / 6 for own in alone]
    assert found.mean["accuracy"] == pytest.approx(sum(each) / 3)
    assert found.best == found.members[found.best_member] == {"accuracy": max(each)}
    hit = [any(own[i].text == e.target for own in alone) for i, e in enumerate(asked)]
    assert found.oracle["accuracy"] == sum(hit) / 6
    mean = compare(backbone, Ensemble(prompts, "average"), asked, ["accuracy", "perplexity"]).ensemble
    texts = [p.text for p in predict(backbone, [averaged(prompts)], asked)]
    assert mean == {"accuracy": sum(t == e.target for t, e in zip(texts, asked, strict=True)) / 6}
    with pytest.raises(PromptError, match="an ensemble is scored by its answers: name another metric"):
        compare(backbone, Ensemble(prompts), asked, ["perplexity"])


def test_weights(backbones: Of) -> None:
    backbone, asked = backbones("bert"), examples()
    prompts = tuple(made_prompt(backbone, seed) for seed in range(3))
    alone = Ensemble(prompts, "weighted", (0.0, 2.0, 0.0)).predict(backbone, asked)
    for a, b in zip(alone, predict(backbone, [prompts[1]], asked), strict=True):
        assert a.text == b.text and a.probabilities == pytest.approx(b.probabilities, abs=1e-5)


@pytest.mark.parametrize(
    ("count", "method", "weights", "says"),
    [
        (1, "vote", (), "an ensemble of 1 prompt is that prompt: give two or more"),
        (2, "votes", (), "unknown method 'votes'; did you mean 'vote'?"),
        (2, "weighted", (1.0,), r"weights \[1.0\] for 2 prompts"),
        (2, "weighted", (0.0, 0.0), "not all 0"),
        (2, "vote", (1.0, 1.0), 'only the method "weighted" reads weights'),
    ],
)
def test_what_is_no_ensemble(
    backbones: Of, count: int, method: str, weights: tuple[float, ...], says: str
) -> None:
    prompts = tuple(InputPrompt(backbones("llama").geometry, 2) for _ in range(count))
    with pytest.raises(PromptError, match=says.replace("?", r"\?")):
        Ensemble(prompts, method, weights)


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.most = max(self.most, sum(self.alive.values()))
        return out


def peak(backbone: Backbone, prompts: list[Any], asked: list[Example]) -> int:
    with Peak() as counted:
        ask(backbone, prompts, asked, batch=16, prefixes=Prefixes(backbone))
    return counted.most


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_five_prompts_need_the_memory_of_one(backbones: Of, family: str) -> None:
    """Bytes of tensors, weights of the model included: at most 1.3 times those of one prompt."""
    backbone = backbones(family)
    asked = [Example("a fine film and more of it " * 3, "good", ("good", "bad"), 0)] * 32
    prompts = [made_prompt(backbone, seed, words=("good", "bad")) for seed in range(5)]
    weights = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    single, five = (weights + peak(backbone, prompts[:k], asked) for k in (1, 5))
    assert single > weights, "the counter saw the pass"
    assert five <= 1.3 * single
