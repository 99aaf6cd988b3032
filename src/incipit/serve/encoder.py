"""Encoders: nothing is written, requests choose among the classes of their prompt's read-out."""

from __future__ import annotations

from collections.abc import Sequence

from incipit.backbones import EncoderBackbone
from incipit.serve.asks import Ask
from incipit.serve.executor import CacheUse, Row, Scored, Took
from incipit.serve.prefixes import Prefixes
from incipit.serve.rooms import EncoderRoom
from incipit.serve.scores import scored


class EncoderExecutor(EncoderRoom):
    """One pass for all rows whose prompts are read out alike; `batched` = False: one for each."""

    def __init__(
        self,
        backbone: EncoderBackbone,
        *,
        rows: int = 34,
        cache_bytes: int = 0,
        batched: bool = True,
    ) -> None:
        super().__init__(backbone, rows=rows, batched=batched)
        self.prefixes = Prefixes(backbone, cache_bytes)

    def enter(self, row: Row) -> str:
        raise AssertionError("an encoder opens no rows")

    def step(self, work: Sequence[tuple[Row, int]]) -> list[Took]:
        raise AssertionError("an encoder writes nothing")

    def leave(self, row: Row) -> None:
        raise AssertionError("an encoder opens no rows")

    def score(self, asks: Sequence[Ask]) -> list[Scored]:
        return scored(self.backbone, self.prefixes, asks, together=self.batched)

    def cache(self) -> CacheUse:
        return self.prefixes.use()
