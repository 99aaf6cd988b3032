"""Ensemble: prompts of one backbone and the rule that makes one answer of theirs.

# B examples, K prompts, C choices
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from incipit.backbones import Backbone, GenerateOptions
from incipit.decode import Prediction, Prefixes
from incipit.ensemble.answers import Answers, ask
from incipit.ensemble.rules import averaged, mixed, oracle, vote
from incipit.ensemble.sesom import Cached, Gate, from_answers, from_vocabulary, gated
from incipit.errors import PromptError, nearest
from incipit.prompts import Prompt
from incipit.tasks.example import Example
from incipit.tasks.metrics import METRICS, compute

METHODS = {
    "vote": "majority vote; ties by summed probability",
    "logits": "mean of the label scores before the softmax",
    "weighted": "the same with fixed weights",
    "average": "one prompt: the mean of their numbers",
    "fixed": "a mixture of label scores with weights learned on few shots",
    "sesom": "a mixture of label scores with weights for each sample, by attention learned on few shots",
}
GATED = ("fixed", "sesom")


@dataclass(frozen=True)
class Ensemble:
    """prompts [K] of one backbone, and how they are mixed. weights [K]: for the method "weighted".
    gate: for the methods "fixed" and "sesom".

    Raises PromptError for an unknown method, for fewer than two prompts, for weights or a gate that do not fit.
    """

    prompts: tuple[Prompt, ...]
    method: str = "vote"
    weights: tuple[float, ...] = ()
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise PromptError(f"unknown method {self.method!r}{nearest(self.method, METHODS)}")
        if len(self.prompts) < 2:
            raise PromptError(
                f"an ensemble of {len(self.prompts)} prompt is that prompt: give two or more of one backbone"
            )
        if self.method == "weighted":
            fits = len(self.weights) == len(self.prompts) and sum(self.weights) > 0 and min(self.weights) >= 0
            if not fits:
                raise PromptError(
                    f"weights {list(self.weights)} for {len(self.prompts)} prompts: give one each, none below 0 and "
                    "not all 0"
                )
        elif self.weights:
            raise PromptError(f'only the method "weighted" reads weights, this is {self.method!r}')
        if (self.method in GATED) != (self.gate is not None) or (
            self.gate is not None
            and (self.gate.settings.kind, self.gate.sources) != (self.method, len(self.prompts))
        ):
            gate = f"a gate {self.gate.settings.kind!r} of {self.gate.sources}" if self.gate else "no gate"
            raise PromptError(
                f"{gate} with the method {self.method!r} of {len(self.prompts)} prompts: the methods "
                f"{' and '.join(GATED)} need a gate that was learned for these prompts, the others none"
            )

    @cached_property
    def readers(self) -> tuple[Prompt, ...]:
        """The prompts that read each input: all, or their average alone."""
        return (averaged(self.prompts),) if self.method == "average" else self.prompts

    def predict(
        self,
        backbone: Backbone,
        examples: Sequence[Example],
        *,
        mode: str = "auto",
        options: GenerateOptions | None = None,
        batch: int = 64,
        prefixes: Prefixes | None = None,
    ) -> list[Prediction]:
        """One Prediction for each example, in their order; see `decode.predict`."""
        if not examples:
            return []
        answers = ask(
            backbone, self.readers, examples, mode=mode, options=options, batch=batch, prefixes=prefixes
        )
        return self.combine(backbone, answers, examples, batch)

    def combine(
        self, backbone: Backbone, answers: Answers, examples: Sequence[Example], batch: int = 64
    ) -> list[Prediction]:
        """One answer of those of all `readers`; a gate of the vocabulary reads the inputs once more."""
        if self.method == "average":
            return answers.predictions[0]
        if self.method == "vote":
            return vote(answers, examples)
        if self.gate is not None:
            found: list[Prediction] = []
            for start in range(0, len(examples), batch):  # scores of a vocabulary are large
                span = slice(start, start + batch)
                part = Answers(
                    [own[span] for own in answers.predictions],
                    answers.scores and [own[span] for own in answers.scores],
                )
                found += gated(self.gate, self.cached(backbone, part, examples[span], batch), examples[span])
            return found
        weights = self.weights or (1.0,) * len(self.prompts)
        return mixed(answers, examples, [w / sum(weights) for w in weights])

    def cached(
        self, backbone: Backbone, answers: Answers, examples: Sequence[Example], batch: int = 64
    ) -> Cached:
        """What the gate reads of these examples."""
        assert self.gate is not None
        if self.gate.settings.space == "vocabulary":
            return from_vocabulary(backbone, self.prompts, examples, self.gate.settings, batch)
        return from_answers(backbone, answers, examples, self.gate.settings)


@dataclass(frozen=True)
class Comparison:
    """As Lester et al. 2021 report it, table 3: mean and best of the members, and the ensemble, by metric.

    members [K]: each one's scores. best: the member of the best THE metric on the very examples that are reported, as
    in the paper, so it is an optimistic choice. oracle: scores of an answer that is right where any member's is.
    """

    members: list[dict[str, float]]
    mean: dict[str, float]
    best: dict[str, float]
    best_member: int
    ensemble: dict[str, float]
    oracle: dict[str, float]

    def table(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return dict(vars(self))


def compare(
    backbone: Backbone,
    ensemble: Ensemble,
    examples: Sequence[Example],
    metrics: Sequence[str],
    *,
    mode: str = "auto",
    options: GenerateOptions | None = None,
    batch: int = 64,
    answers: Answers | None = None,
) -> Comparison:
    """Scores of the members, their mean and best, the ensemble and the oracle; each prompt reads each input once.

    answers: of all members, where they were asked already.

    Raises PromptError where perplexity is asked for, which answers do not tell.
    """
    names = [name for name in metrics if name != "perplexity"]
    if not names:
        raise PromptError(
            "perplexity is a matter of likelihoods, and an ensemble is scored by its answers: name another metric"
        )
    prefixes = Prefixes(backbone)
    if answers is None:
        answers = ask(
            backbone, ensemble.prompts, examples, mode=mode, options=options, batch=batch, prefixes=prefixes
        )
    if ensemble.method == "average":
        found = ensemble.predict(
            backbone, examples, mode=mode, options=options, batch=batch, prefixes=prefixes
        )
    else:
        found = ensemble.combine(backbone, answers, examples, batch)

    def scored(predictions: Sequence[Prediction]) -> dict[str, float]:
        scores = compute(names, [p.text for p in predictions], examples)
        if all(p.probabilities for p in predictions):  # a ranked answer is legal by construction
            scores.pop("legal_rate", None)
        return scores

    members = [scored(own) for own in answers.predictions]
    sign = 1 if METRICS[names[0]].higher_is_better else -1
    best = max(range(len(members)), key=lambda k: sign * members[k][names[0]])
    mean = {name: statistics.fmean(one[name] for one in members) for name in members[0]}
    return Comparison(members, mean, members[best], best, scored(found), scored(oracle(answers, examples)))
