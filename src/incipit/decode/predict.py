"""Answers for examples under any mixture of prompts.

# B batch, K prompts, C candidates
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from incipit.backbones import Backbone, EncoderBackbone, GenerateOptions
from incipit.batch import Batch, Encoded, collate
from incipit.decode.rank import class_probabilities, rank, stacked
from incipit.encode import question
from incipit.errors import PromptError
from incipit.prompts import Prompt
from incipit.tasks.example import Example


@dataclass(frozen=True)
class Prediction:
    """text: the answer. probabilities: label word -> share, when the answer was ranked. choice: its index."""

    text: str
    choice: int | None = None
    probabilities: dict[str, float] = field(default_factory=dict)


def predict(
    backbone: Backbone,
    prompts: Sequence[Prompt | None],
    examples: Sequence[Example],
    rows: Sequence[int] | None = None,
    *,
    mode: str = "auto",
    options: GenerateOptions | None = None,
    batch: int = 64,
) -> list[Prediction]:
    """One Prediction per example; example i is read by prompts[rows[i]] (default: prompt 0).

    mode: "rank" scores each example's choices, "generate" writes text, "auto" ranks where there are choices.
    Rows of equal length are batched together whatever their prompt; the order of the answers is that of the examples.
    """
    rows = list(rows) if rows is not None else [0] * len(examples)
    answers: list[Prediction | None] = [None] * len(examples)
    ranked = [i for i, e in enumerate(examples) if mode == "rank" or (mode == "auto" and e.choices)]
    written = sorted(set(range(len(examples))) - set(ranked))
    options = options or GenerateOptions()
    room = [p.length if p is not None else 0 for p in prompts]
    more = options.max_new_tokens if backbone.family == "causal" else 0  # an answer stands behind its input
    with torch.no_grad():
        for index in _chunks(ranked, examples, batch):
            part = [examples[i] for i in index]
            picked, local = _local(prompts, [rows[i] for i in index])
            if isinstance(backbone, EncoderBackbone):
                encoded = [question(backbone, examples[i], room=room[rows[i]]) for i in index]
                shares = class_probabilities(backbone, _batch(backbone, encoded, local), picked, part)
            else:
                rooms = [room[rows[i]] for i in index]
                shares = rank(backbone, picked, part, local, rooms)
            for i, example, share in zip(index, part, shares, strict=True):
                best = max(range(len(share)), key=share.__getitem__)
                pairs = dict(zip(example.choices, share, strict=True))
                answers[i] = Prediction(example.choices[best], best, pairs)
        for index in _chunks(written, examples, batch):
            if isinstance(backbone, EncoderBackbone):
                raise PromptError(
                    f"backbone {backbone.name!r} is an encoder and writes no text: rank label words "
                    '(decode.mode = "rank"), or use a causal or encoder-decoder backbone'
                )
            picked, local = _local(prompts, [rows[i] for i in index])
            encoded = [question(backbone, examples[i], room=room[rows[i]] + more) for i in index]
            ready = _batch(backbone, encoded, local)
            out = backbone.generate(ready, stacked(picked, ready.rows), options)
            for i, ids in zip(index, out, strict=True):
                answers[i] = Prediction(backbone.decode(ids))
    return [a for a in answers if a is not None]


def _batch(backbone: Backbone, encoded: Sequence[Encoded], rows: Sequence[int]) -> Batch:
    return collate(encoded, rows, pad_id=backbone.pad_id).to(backbone.device)


def _local(prompts: Sequence[Prompt | None], rows: Sequence[int]) -> tuple[list[Prompt | None], list[int]]:
    """The prompts that a batch really uses, and its rows among them."""
    used = sorted(set(rows))
    return [prompts[k] for k in used], [used.index(k) for k in rows]


def _chunks(index: Sequence[int], examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first (so that memory fails early)."""
    order = sorted(index, key=lambda i: -len(examples[i].input))
    for start in range(0, len(order), size):
        yield order[start : start + size]
