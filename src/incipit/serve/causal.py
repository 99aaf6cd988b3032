"""Causal backbones: one forward pass over all rows at once, or each row by itself through the model's own cache.

# B rows, M slots of a stream, P length, T text, H hidden, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from incipit.backbones import CausalBackbone, alone, attend, slots
from incipit.backbones.memory import Shelf, Slots
from incipit.errors import IncipitError
from incipit.injection import Injection
from incipit.serve.asks import Ask
from incipit.serve.executor import CacheUse, Row, Scored, Took
from incipit.serve.prefixes import Prefixes
from incipit.serve.rooms import CausalRoom
from incipit.serve.sampling import Held, next_tokens
from incipit.serve.scores import scored


class CausalExecutor(CausalRoom):
    """batched: one pass for all rows over slots (backbones/slots.py); otherwise each row by itself, which every causal
    model can do and which the self-check compares with.
    """

    def __init__(
        self,
        backbone: CausalBackbone,
        *,
        rows: int = 34,
        room: int = 0,
        cache_bytes: int = 0,
        batched: bool = True,
    ) -> None:
        super().__init__(backbone, rows=rows, room=room, batched=batched)
        self.prefixes = Prefixes(backbone, cache_bytes)
        self._free = list(range(rows - 1, -1, -1))
        if batched:
            shapes = backbone.geometry.sites.get("decoder") or alone.shapes(backbone)
            self._own = {id(module): layer for layer, module in enumerate(backbone.attentions)}
            self._shelf = Shelf(shapes, backbone.dtype, backbone.device)
            self._slots = Slots(shapes, rows, self.room, backbone.dtype, backbone.device)

    # -- rows ------------------------------------------------------------------------------------------------------

    def enter(self, row: Row) -> str:
        version = row.ask.version
        if version is None:
            row.held = Held(slot=self._free.pop(), prompt=None)
            return ""
        try:
            injection = self.prefixes.take(version)
        except IncipitError as error:
            return str(error)
        row.held = Held(slot=self._free.pop(), prompt=injection)
        if self.batched and injection.keys:
            self._shelf.enter(version.id, lambda: injection)
        return ""

    def leave(self, row: Row) -> None:
        held: Held = row.held
        if row.ask.version is not None:
            if self.batched and held.kept["prompt"].keys:
                self._shelf.leave(row.ask.version.id)
            self.prefixes.give(row.ask.version.id)
        if self.batched and (
            held.kept.get("astray") or not row.new
        ):  # no logits have shown that it is finite
            self._slots.clear(held.slot)
        self._free.append(held.slot)
        self._free.sort(reverse=True)  # the lowest first, so that rows stand side by side
        row.held = None

    @torch.no_grad()
    def step(self, work: Sequence[tuple[Row, int]]) -> list[Took]:
        logits, done = self.logits(work)
        took = [Took()] * len(work)
        if not done:
            return took
        for i, one in zip(done, next_tokens([work[i][0] for i in done], logits), strict=True):
            took[i] = one
            if one.error:
                work[i][0].held.kept["astray"] = True
        return took

    @torch.no_grad()
    def logits(self, work: Sequence[tuple[Row, int]]) -> tuple[Tensor, list[int]]:
        """Logits [B', V] after the rows that are read to their end now, and which of `work` those are."""
        done = [i for i, (row, count) in enumerate(work) if row.read + count >= len(row.ask.ids)]
        if not self.batched:
            found = [self._alone(row, count) for row, count in work]
            return torch.cat([found[i] for i in done]) if done else torch.empty(0), done
        rows, embeds = [], self._embedded(work)
        for (row, _), (own, before) in zip(work, embeds, strict=True):
            held = row.held
            name = row.ask.version.id if row.ask.version is not None and held.kept["prompt"].keys else None
            rows.append((held.slot, before, own.shape[0], name))
        laid, order, last, positions = slots.lay(self._slots, self._shelf, self._own, rows)
        states = attend.streamed(
            self.backbone.body, torch.cat([embeds[i][0] for i in order]), positions, laid
        )
        return self.backbone.head(states[last[done]]) if done else states, done

    def _embedded(self, work: Sequence[tuple[Row, int]]) -> list[tuple[Tensor, int]]:
        """For each row what it reads next [n, H], and how many positions of its slot are taken."""
        ids = [row.ask.ids[row.read : row.read + n] if n else (row.new[-1],) for row, n in work]
        together = self.backbone.embed([i for own in ids for i in own]).split([len(own) for own in ids])
        return [self._after_prompt(row, own) for (row, _), own in zip(work, together, strict=True)]

    def _after_prompt(self, row: Row, own: Tensor) -> tuple[Tensor, int]:
        before = row.read + max(0, len(row.new) - 1)
        prompt: Injection | None = row.held.kept["prompt"]
        if prompt is None or prompt.inputs is None:
            return own, before
        assert prompt.live is not None  # a model that cannot share a prefix: the prompt is part of the row
        front = prompt.inputs[0, prompt.live[0]].to(own.dtype)
        return (torch.cat([front, own]), 0) if row.read == 0 else (own, before + len(front))

    def _alone(self, row: Row, count: int) -> Tensor:
        """Logits [1, V] after a row's next positions, read by itself."""
        held: Held = row.held
        if "cache" not in held.kept:
            held.kept["cache"] = alone.opened(self.backbone, held.kept["prompt"])
        return alone.advanced(self.backbone, held.kept["cache"], self._embedded([(row, count)])[0][0])

    # -- candidates ------------------------------------------------------------------------------------------------

    def score(self, asks: Sequence[Ask]) -> list[Scored]:
        return scored(self.backbone, self.prefixes, asks, together=self.batched)

    def cache(self) -> CacheUse:
        return self.prefixes.use()
