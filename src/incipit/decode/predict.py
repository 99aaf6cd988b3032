"""Answers for examples under any mixture of prompts.

# B batch, K prompts, C candidates
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from incipit.backbones import Backbone, EncoderBackbone, GenerateOptions
from incipit.batch import Batch, Encoded, collate
from incipit.decode.prefixes import Prefixes
from incipit.decode.rank import class_scores, log_scores, stacked
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
    prefixes: Prefixes | None = None,
) -> list[Prediction]:
    """One Prediction per example; example i is read by prompts[rows[i]] (default: prompt 0).

    mode: "rank" scores each example's choices, "generate" writes text, "auto" ranks where there are choices.
    Rows of equal length are batched together whatever their prompt; the order of the answers is that of the examples.
    What the prompts make of the model is computed once a call; `prefixes` keeps it from one call to the next.
    Raises PromptError for written text on an encoder, and for prompts that cannot share a batch.
    """
    rows = list(rows) if rows is not None else [0] * len(examples)
    ranked = {i for i, e in enumerate(examples) if mode == "rank" or (mode == "auto" and e.choices)}
    written = [i for i in range(len(examples)) if i not in ranked]
    if written and isinstance(backbone, EncoderBackbone):
        raise PromptError(
            f"backbone {backbone.name!r} is an encoder and writes no text: rank label words "
            '(decode.mode = "rank"), or use a causal or encoder-decoder backbone'
        )
    reader = _Reader(backbone, prompts, examples, rows, prefixes, options or GenerateOptions())
    answers: dict[int, Prediction] = {}
    with torch.no_grad():
        for index in _chunks(sorted(ranked), examples, batch):
            answers |= zip(index, reader.rank(index), strict=True)
        for index in _chunks(written, examples, batch):
            answers |= zip(index, reader.write(index), strict=True)
    return [answers[i] for i in range(len(examples))]


def predict_all(
    backbone: Backbone,
    prompts: Sequence[Prompt | None],
    examples: Sequence[Example],
    *,
    mode: str = "auto",
    options: GenerateOptions | None = None,
    batch: int = 64,
    prefixes: Prefixes | None = None,
) -> list[list[Prediction]]:
    """Every prompt on every example, K lists of B predictions: K · B rows over one frozen model, as for an ensemble.

    Copies of a text stand in the same batches, and are made token ids once where their prompts leave equal room.
    """
    rows = [k for k in range(len(prompts)) for _ in examples]
    asked = list(examples) * len(prompts)
    found = predict(
        backbone, prompts, asked, rows, mode=mode, options=options, batch=batch, prefixes=prefixes
    )
    return [found[k * len(examples) : (k + 1) * len(examples)] for k in range(len(prompts))]


def score_all(
    backbone: Backbone,
    prompts: Sequence[Prompt | None],
    examples: Sequence[Example],
    *,
    batch: int = 64,
    prefixes: Prefixes | None = None,
) -> list[list[list[float]]]:
    """Scores of every example's choices under every prompt, before the softmax: [K][B][C], in the batches of
    `predict_all`. Of a generative backbone they are log-probabilities, of an encoder the logits of its read-out."""
    rows = [k for k in range(len(prompts)) for _ in examples]
    asked = list(examples) * len(prompts)
    reader = _Reader(backbone, prompts, asked, rows, prefixes, GenerateOptions())
    found: dict[int, list[float]] = {}
    with torch.no_grad():
        for index in _chunks(range(len(asked)), asked, batch):
            found |= zip(index, reader.scores(index), strict=True)
    count = len(examples)
    return [[found[i] for i in range(k * count, (k + 1) * count)] for k in range(len(prompts))]


def ranked(example: Example, scores: Sequence[float]) -> Prediction:
    """The likeliest choice of an example: shares = softmax(scores), the first of equals."""
    shares: list[float] = torch.tensor(list(scores)).softmax(dim=0).tolist()
    best = max(range(len(shares)), key=shares.__getitem__)
    return Prediction(example.choices[best], best, dict(zip(example.choices, shares, strict=True)))


class _Reader:
    """One call of `predict`: what its batches share."""

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[Prompt | None],
        examples: Sequence[Example],
        rows: Sequence[int],
        prefixes: Prefixes | None,
        options: GenerateOptions,
    ) -> None:
        if prefixes is not None and prefixes.backbone is not backbone:
            raise PromptError(
                f"the prefixes were computed by backbone {prefixes.backbone.name!r}, the rows are read by "
                f"{backbone.name!r}: keep Prefixes for each backbone"
            )
        self.backbone, self.prompts, self.examples, self.rows = backbone, prompts, examples, rows
        self.options = options
        several = len(rows) > len(set(rows))  # otherwise each prompt is read once, together with its row
        self.prefixes = Prefixes(backbone) if prefixes is None and several else prefixes
        self.room = [p.length if p is not None else 0 for p in prompts]
        self._encoded: dict[tuple[int, int], Encoded] = {}  # by id(example) and room
        self._candidates: dict[tuple[int, int], list[Encoded]] = {}
        self._blank: dict[int, bool] = {}

    def rank(self, index: Sequence[int]) -> list[Prediction]:
        """The likeliest choice of each of these examples."""
        return [ranked(self.examples[i], one) for i, one in zip(index, self.scores(index), strict=True)]

    def scores(self, index: Sequence[int]) -> list[list[float]]:
        """What each of these examples' choices scores, before the softmax."""
        part = [self.examples[i] for i in index]
        picked, local = self._picked(index)
        if isinstance(self.backbone, EncoderBackbone):
            return class_scores(self.backbone, self._batch(index, local), picked, part)
        rooms = [self.room[self.rows[i]] for i in index]
        return log_scores(self.backbone, picked, part, local, rooms, self._candidates)

    def write(self, index: Sequence[int]) -> list[Prediction]:
        """What the model writes to these examples."""
        picked, local = self._picked(index)
        more = self.options.max_new_tokens if self.backbone.family == "causal" else 0  # behind its input
        ready = self._batch(index, local, more)
        out = self.backbone.generate(ready, stacked(picked, ready.rows), self.options)
        return [Prediction(self.backbone.decode(ids)) for ids in out]

    def _picked(self, index: Sequence[int]) -> tuple[list[Prompt | None], list[int]]:
        """The prompts that these rows really use, and each row's place among them."""
        used = sorted({self.rows[i] for i in index})
        place = {k: n for n, k in enumerate(used)}
        picked = [self.prompts[k] for k in used]
        if self.prefixes is not None and not any(self._is_blank(i) for i in index):
            picked = self.prefixes.ready(picked)
        return picked, [place[self.rows[i]] for i in index]

    def _is_blank(self, i: int) -> bool:
        """Whether a row has no text of its own: then a prompt row must stay with it, to predict its answer."""
        example = self.examples[i]
        if id(example) not in self._blank:
            text = example.messages or self.backbone.ending or self.backbone.text_ids(example.input)
            self._blank[id(example)] = not text
        return self._blank[id(example)]

    def _batch(self, index: Sequence[int], local: Sequence[int], more: int = 0) -> Batch:
        encoded = []
        for i in index:
            key = id(self.examples[i]), self.room[self.rows[i]] + more
            if key not in self._encoded:
                self._encoded[key] = question(self.backbone, self.examples[i], room=key[1])
            encoded.append(self._encoded[key])
        return collate(encoded, local, pad_id=self.backbone.pad_id).to(self.backbone.device)


def _chunks(index: Sequence[int], examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first (so that memory fails early)."""
    order = sorted(index, key=lambda i: -len(examples[i].input))
    for start in range(0, len(order), size):
        yield order[start : start + size]
