"""Encoders: nothing is written, requests choose among the classes of their prompt's read-out."""

from __future__ import annotations

from collections.abc import Sequence

from incipit.backbones import EncoderBackbone
from incipit.serve.asks import Ask, Sampling
from incipit.serve.executor import CacheUse, Row, Scored, Took
from incipit.serve.prefixes import MAX_BYTES, Prefixes
from incipit.serve.scores import scored


class EncoderExecutor:
    """One pass for all rows whose prompts are read out alike; `batched` = False: one for each."""

    chunks = False

    def __init__(
        self,
        backbone: EncoderBackbone,
        *,
        rows: int = 34,
        cache_bytes: int = MAX_BYTES,
        batched: bool = True,
    ) -> None:
        self.backbone, self.batched = backbone, batched
        self.mode = "batched" if batched else "rows"
        self.slots, self.tokens = rows, rows * (backbone.space or 512)
        self.prefixes = Prefixes(backbone, cache_bytes)

    def fits(self, ask: Ask) -> str:
        if isinstance(ask.do, Sampling):
            return f"backbone {self.backbone.name!r} is an encoder and writes no text: ask it to choose"
        if ask.version is None or not ask.version.card["task"].get("words"):
            return (
                f"backbone {self.backbone.name!r} is an encoder: it chooses by a prompt that has label words"
            )
        words = len(ask.version.card["task"]["words"])
        if len(ask.do.ends) != words:
            return f"prompt {ask.version.name!r} chooses among {words} words, the request names {len(ask.do.ends)}"
        most = self.backbone.geometry.max_length
        if most and self.cost(ask) > most:
            return (
                f"prompt and input make {self.cost(ask)} positions, the model has {most}: shorten the input"
            )
        return ""

    def cost(self, ask: Ask) -> int:
        return len(ask.ids) + (ask.version.length if ask.version is not None else 0)

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
