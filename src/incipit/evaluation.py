"""Task x Backbone x (Prompt | nothing) -> scores and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from incipit.backbones import Backbone, EncoderBackbone, GenerateOptions
from incipit.batch import collate
from incipit.decode import Prediction, predict, stacked
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
    """Scores of one prompt (or of the bare backbone) on examples.

    legality: for a generative backbone also generate freely, and report as `legal_rate` the share of answers that
    are label words; ranking alone cannot give an illegal answer. Perplexity is computed from the targets.
    """
    options = options or DecodeOptions()
    texts = [m for m in metrics if m != "perplexity"]
    predictions: list[Prediction] = []
    if texts:
        predictions = predict(
            backbone, [prompt], examples, mode=options.mode, options=options.generate, batch=options.batch
        )
    nll, count = (
        likelihood(backbone, prompt, examples, options.batch) if len(texts) < len(metrics) else (None, None)
    )
    scores = compute(metrics, [p.text for p in predictions], examples, nll=nll, count=count)
    if all(p.probabilities for p in predictions):  # a ranked answer is legal by construction
        scores.pop("legal_rate", None)
    if legality and not isinstance(backbone, EncoderBackbone) and any(e.choices for e in examples):
        free = predict(
            backbone, [prompt], examples, mode="generate", options=options.generate, batch=options.batch
        )
        scores["legal_rate"] = compute(["accuracy"], [p.text for p in free], examples)["legal_rate"]
    return Evaluation(scores, predictions)


def likelihood(
    backbone: Backbone, prompt: Prompt | None, examples: Sequence[Example], batch: int = 64
) -> tuple[float, int]:
    """Negative log-likelihood in nats summed over all target tokens, and their number."""
    room = prompt.length if prompt is not None else 0
    total, tokens = 0.0, 0
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input))
    with torch.no_grad():
        for start in range(0, len(order), batch):
            encoded = [encode(backbone, examples[i], room=room) for i in order[start : start + batch]]
            ready = collate(encoded, pad_id=backbone.pad_id).to(backbone.device)
            nll, count = backbone.loss(ready, stacked([prompt], ready.rows))
            total, tokens = total + float(nll.sum()), tokens + int(count.sum())
    return total, tokens
