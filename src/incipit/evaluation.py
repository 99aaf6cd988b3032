"""Task x Backbone x (Prompt | nothing) -> scores and predictions, of one prompt or of many in the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from incipit.backbones import Backbone, EncoderBackbone, GenerateOptions
from incipit.batch import collate
from incipit.decode import Prediction, Prefixes, predict, stacked
from incipit.encode import encode
from incipit.prompts import Prompt
from incipit.tasks.example import Example
from incipit.tasks.metrics import compute


@dataclass(frozen=True)
class DecodeOptions:
    """How answers are made. mode: "auto" ranks where there are choices, "rank", or "generate". batch: rows a pass."""

    mode: str = "auto"
    batch: int = 64
    generate: GenerateOptions = field(default_factory=GenerateOptions)


@dataclass(frozen=True)
class Trial:
    """One prompt, or the bare backbone, and what it is scored on; the first metric is THE metric."""

    prompt: Prompt | None
    examples: Sequence[Example]
    metrics: Sequence[str]
    options: DecodeOptions = field(default_factory=DecodeOptions)


@dataclass(frozen=True)
class Evaluation:
    """scores: metric -> value, the first is THE metric. predictions in the order of the examples."""

    scores: dict[str, float]
    predictions: list[Prediction]


def evaluate(
    backbone: Backbone,
    prompt: Prompt | None,
    examples: Sequence[Example],
    metrics: Sequence[str],
    options: DecodeOptions | None = None,
    *,
    legality: bool = False,
) -> Evaluation:
    """Scores of one prompt (or of the bare backbone) on examples; see `evaluate_all`."""
    trial = Trial(prompt, examples, metrics, options or DecodeOptions())
    return evaluate_all(backbone, [trial], legality=legality)[0]


def evaluate_all(
    backbone: Backbone, trials: Sequence[Trial], *, legality: bool = False, prefixes: Prefixes | None = None
) -> list[Evaluation]:
    """Each trial's scores and predictions; trials with equal options share their batches.

    legality: for a generative backbone also generate freely, and report as `legal_rate` the share of answers that
    are label words; ranking alone cannot give an illegal answer. Perplexity is computed from the targets. Raises
    DataError for an unknown metric, or for no examples.
    """
    prefixes = Prefixes(backbone) if prefixes is None else prefixes
    worded = [k for k, t in enumerate(trials) if any(m != "perplexity" for m in t.metrics)]
    answers = _answers(backbone, trials, worded, prefixes)
    sums = _likelihoods(
        backbone, trials, [k for k, t in enumerate(trials) if "perplexity" in t.metrics], prefixes
    )
    free: dict[int, list[Prediction]] = {}
    if legality and not isinstance(backbone, EncoderBackbone):
        chosen = [k for k, t in enumerate(trials) if any(e.choices for e in t.examples)]
        free = _answers(backbone, trials, chosen, prefixes, mode="generate")
    found = []
    for k, trial in enumerate(trials):
        predictions = answers.get(k, [])
        nll, count = sums.get(k, (None, None))
        scores = compute(trial.metrics, [p.text for p in predictions], trial.examples, nll=nll, count=count)
        if all(p.probabilities for p in predictions):  # a ranked answer is legal by construction
            scores.pop("legal_rate", None)
        if k in free:
            texts = [p.text for p in free[k]]
            scores["legal_rate"] = compute(["accuracy"], texts, trial.examples)["legal_rate"]
        found.append(Evaluation(scores, predictions))
    return found


def _groups(trials: Sequence[Trial], chosen: Sequence[int]) -> list[list[int]]:
    """Trials that can share batches: with equal options, and all with a prompt or all without."""
    found: dict[tuple[DecodeOptions, bool], list[int]] = {}
    for k in chosen:
        found.setdefault((trials[k].options, trials[k].prompt is None), []).append(k)
    return list(found.values())


def _rows(trials: Sequence[Trial], group: Sequence[int]) -> tuple[list[Example], list[int]]:
    """All examples of a group, and for each the place of its trial in the group."""
    examples = [e for k in group for e in trials[k].examples]
    return examples, [n for n, k in enumerate(group) for _ in trials[k].examples]


def _answers(
    backbone: Backbone, trials: Sequence[Trial], chosen: Sequence[int], prefixes: Prefixes, mode: str = ""
) -> dict[int, list[Prediction]]:
    """Trial -> its predictions in the order of its examples."""
    answers: dict[int, list[Prediction]] = {}
    for group in _groups(trials, chosen):
        examples, rows = _rows(trials, group)
        options = trials[group[0]].options
        found = iter(
            predict(
                backbone,
                [trials[k].prompt for k in group],
                examples,
                rows,
                mode=mode or options.mode,
                options=options.generate,
                batch=options.batch,
                prefixes=prefixes,
            )
        )
        for k in group:
            answers[k] = [next(found) for _ in trials[k].examples]
    return answers


def _likelihoods(
    backbone: Backbone, trials: Sequence[Trial], chosen: Sequence[int], prefixes: Prefixes
) -> dict[int, tuple[float, int]]:
    """Trial -> (negative log-likelihood in nats summed over all its target tokens, their number)."""
    sums = dict.fromkeys(chosen, (0.0, 0))
    for group in _groups(trials, chosen):
        examples, rows = _rows(trials, group)
        prompts = [trials[k].prompt for k in group]
        room = [p.length if p is not None else 0 for p in prompts]
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].input))
        size = trials[group[0]].options.batch
        with torch.no_grad():
            for start in range(0, len(order), size):
                index = order[start : start + size]
                encoded = [encode(backbone, examples[i], room=room[rows[i]]) for i in index]
                blank = not all(e.input_ids for e in encoded)  # a prompt row must then stay with the text
                read = prompts if blank else prefixes.ready(prompts)
                batch = collate(encoded, [rows[i] for i in index], pad_id=backbone.pad_id).to(backbone.device)
                nll, count = backbone.loss(batch, stacked(read, batch.rows))
                for i, more, words in zip(index, nll.tolist(), count.tolist(), strict=True):
                    total, tokens = sums[group[rows[i]]]
                    sums[group[rows[i]]] = total + more, tokens + words
    return sums
