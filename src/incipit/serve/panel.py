"""An ensemble as one model: a row for each member in the passes of all others, and one rule over what they say.

# K members, C candidates, O scores of a member (C candidates or V pieces)
A request that chooses is scored in one pass, a row for each member, and mixed as `Ensemble.combine` mixes. One that
writes is K requests, whose texts are voted on when the last has ended: until then there is nothing to say.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from incipit.backbones import Backbone
from incipit.decode import Prediction, ranked
from incipit.ensemble import Answers, Ensemble, from_ids, gated, majority
from incipit.errors import DataError, IncipitError
from incipit.serve.asks import Ask, Choose, Delta, End, Event, Ticket
from incipit.serve.executor import Scored
from incipit.serve.sampling import NOT_FINITE
from incipit.tasks.example import Example

if TYPE_CHECKING:
    from incipit.serve.asks import PinnedVersion


@dataclass(frozen=True)
class Panel:
    """The members [K] of an ensemble, in order, and the rule that mixes them."""

    members: tuple[PinnedVersion, ...]
    rule: Ensemble

    @property
    def votes(self) -> bool:
        """Whether texts can be mixed, not scores of label words alone."""
        return self.rule.method == "vote"

    @property
    def wide(self) -> bool:
        """Whether it reads scores of the whole vocabulary."""
        gate = self.rule.gate
        return gate is not None and gate.settings.space == "vocabulary"

    def scored(self, backbone: Backbone, ask: Ask, scores: Sequence[Sequence[float] | Tensor]) -> Scored:
        """One answer of the members' scores [K][O], before the softmax."""
        assert isinstance(ask.do, Choose)
        count, gate = len(ask.do.ends), self.rule.gate
        if not self.wide and any(len(one) != count for one in scores):
            return Scored(
                error=f"a member of the ensemble does not choose among {count} words as the request does"
            )
        if gate is not None and any(len(one) != gate.outputs for one in scores):
            return Scored(
                error=f"the ensemble's weights were learned for {gate.outputs} scores, not for {len(scores[0])}"
            )
        example = Example("", "", choices=tuple(map(str, range(count))))
        try:
            found = self._mixed(backbone, ask, example, scores)
        except IncipitError as error:
            return Scored(error=str(error))
        shares = [found.probabilities[name] for name in example.choices]
        if not all(map(math.isfinite, shares)):
            return Scored(error=NOT_FINITE)
        return Scored(tuple(math.log(s) if s > 0 else -math.inf for s in shares), choice=found.choice)

    def _mixed(
        self, backbone: Backbone, ask: Ask, example: Example, scores: Sequence[Sequence[float] | Tensor]
    ) -> Prediction:
        gate = self.rule.gate
        if gate is not None:
            table = torch.stack([torch.as_tensor(one, dtype=torch.float32) for one in scores])  # [K, O]
            cached = from_ids(backbone, ask.ids, table, self._words(ask), gate.settings)
            return gated(gate, cached, [example])[0]
        rows = [[list(map(float, one))] for one in scores]  # [K][1][C]
        answers = Answers([[ranked(example, one) for one in own] for own in rows], rows)
        return self.rule.combine(backbone, answers, [example])[0]

    def _words(self, ask: Ask) -> Tensor:
        """Which of the O scores are those of the candidates [C]."""
        assert isinstance(ask.do, Choose)
        if not self.wide:
            return torch.arange(len(ask.do.ends))
        firsts = [end[0] for end in ask.do.ends]
        if len(set(firsts)) < len(firsts):
            raise DataError(
                "two label words begin with the same piece, so one written token does not tell them apart: learn the "
                'weights anew with space = "words"'
            )
        return torch.tensor(firsts)


def voted(submit: Callable[[Ask], Ticket], ask: Ask) -> Ticket:
    """A ticket for what most members write; `submit` is asked once for each, and takes all or none."""
    assert ask.version is not None and ask.version.panel is not None
    vote = _Vote(ask)
    try:
        for member in ask.version.panel.members:
            vote.parts.append(submit(replace(ask, version=member)))
    except BaseException:
        vote.cancel()
        raise
    for k, part in enumerate(vote.parts):
        part.listen(partial(vote.tell, k))
    return vote.ticket


class _Vote:
    """K tickets on their way, and the one that is made of them."""

    def __init__(self, ask: Ask) -> None:
        self.ticket = Ticket(ask, lambda _: self.cancel())
        self.parts: list[Ticket] = []
        self._ends: dict[int, End] = {}
        self._lock = threading.Lock()  # never held while another ticket is told anything
        self._failed: End | None = None  # the first that said neither "stop" nor "length"

    def cancel(self) -> None:
        for part in self.parts:
            part.cancel()

    def tell(self, k: int, event: Event) -> None:
        """An event of member k; from the engine's thread, or from whoever cancels."""
        if not isinstance(event, End):
            return
        with self._lock:
            self._ends[k] = event
            first = event.reason not in ("stop", "length") and self._failed is None
            self._failed = event if first else self._failed
            whole = len(self._ends) == len(self.parts)
        if first:  # what one member cannot say, the ensemble cannot
            self.cancel()
        if not whole:
            return
        ends = [self._ends[i] for i in range(len(self.parts))]
        self.ticket.put(_summed(self._failed or self._chosen(ends), ends))

    def _chosen(self, ends: Sequence[End]) -> End:
        """Hand out the text of the majority; returns the end of the first who wrote it."""
        texts = [part.text for part in self.parts]
        best = majority(Example("", ""), [Prediction(text) for text in texts]).text
        k = next(i for i, text in enumerate(texts) if text.strip() == best)
        self.ticket.put(Delta(self.parts[k].tokens, texts[k]))
        return replace(ends[k], text="", first_token=max(end.seconds for end in ends))


def _summed(end: End, ends: Sequence[End]) -> End:
    """The end of all: what every member has read and written counts."""
    return replace(
        end,
        text="",
        prompt_tokens=sum(e.prompt_tokens for e in ends),
        input_tokens=sum(e.input_tokens for e in ends),
        new_tokens=sum(e.new_tokens for e in ends),
        waited=min(e.waited for e in ends),
        seconds=max(e.seconds for e in ends),
    )
