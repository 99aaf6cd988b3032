"""The next token of each row, chosen as if the row were alone.

# B rows, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from incipit.backbones.decoding import row_seeds
from incipit.backbones.writing import largest
from incipit.serve.asks import Sampling
from incipit.serve.executor import Row, Took

COLD = 1e-5  # a lower temperature is greedy, as in vLLM: logits divided by it need not be finite


class Draws:
    """The noise of one row: what `decoding.RowNoise` draws for it, step by step."""

    def __init__(self, row: Row, device: torch.device) -> None:
        ids = torch.tensor([row.ask.ids])
        (seed,) = row_seeds(ids, torch.ones_like(ids, dtype=torch.bool), row.seed)
        self.generator = torch.Generator(device).manual_seed(seed)

    def gumbel(self, scores: Tensor) -> Tensor:
        """Gumbel(0, 1) noise like scores [V]."""
        wait = torch.empty_like(scores).exponential_(generator=self.generator)
        return -wait.clamp(min=torch.finfo(wait.dtype).tiny).log()


def next_tokens(rows: Sequence[Row], logits: Tensor) -> list[Took]:
    """The token that each row writes after logits [B, V]; a row whose logits are not finite ends alone."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    finite = torch.isfinite(logits.sum(dim=-1))  # of a whole row, without a look at each number
    if not bool(finite.all()):  # it may also be the sum that is too large
        finite = torch.isfinite(logits).all(dim=-1)
    chosen = largest(logits)
    do = [_sampling(row) for row in rows]
    drawn = [i for i, s in enumerate(do) if s.temperature >= COLD]
    if drawn:
        scores = _cut(logits[drawn], [do[i] for i in drawn])
        for n, i in enumerate(drawn):
            noise = rows[i].held.draws(rows[i], logits.device).gumbel(scores[n])
            chosen[i] = (scores[n] + noise).argmax()
    told = [i for i, s in enumerate(do) if s.logprobs]
    logs: dict[int, float] = {}
    if told:
        each = logits[told].log_softmax(dim=-1).gather(1, chosen[told][:, None])[:, 0]
        logs = dict(zip(told, each.tolist(), strict=True))
    return [
        Took(token, logs.get(i, 0.0)) if fine else Took(error=NOT_FINITE)
        for i, (token, fine) in enumerate(zip(chosen.tolist(), finite.tolist(), strict=True))
    ]


NOT_FINITE = (
    "the model's numbers for this request are not finite: its prompt is damaged or was trained astray; use another "
    "version of the prompt"
)


class Held:
    """What an executor keeps of an open row: its slot, and its noise once it draws."""

    def __init__(self, **kept: Any) -> None:
        self.slot: int = kept.pop("slot", -1)
        self.kept = kept
        self._draws: Draws | None = None

    def draws(self, row: Row, device: torch.device) -> Draws:
        """The row's noise, begun on first use."""
        if self._draws is None:
            self._draws = Draws(row, device)
        return self._draws


def _sampling(row: Row) -> Sampling:
    assert isinstance(row.ask.do, Sampling)
    return row.ask.do


def _cut(logits: Tensor, do: Sequence[Sampling]) -> Tensor:
    """Scores [B, V] at each row's temperature, without what its top_k and top_p leave out."""
    vocabulary = logits.shape[-1]
    heat = torch.tensor([s.temperature for s in do], dtype=logits.dtype, device=logits.device)
    scores = logits / heat[:, None]
    for i, s in enumerate(do):
        if 0 < s.top_k < vocabulary:
            least = scores[i].topk(s.top_k).values[-1]
            scores[i] = scores[i].masked_fill(scores[i] < least, -torch.inf)
        if s.top_p < 1.0:
            ordered, index = scores[i].sort()
            gone = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - s.top_p
            gone[-1] = False
            scores[i, index[gone]] = -torch.inf
    return scores
