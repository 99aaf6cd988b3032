"""What fits into an executor: slots, positions and the bounds of the model, without the memory itself.

Told apart from the executors so that whoever admits requests may sit in another process than the model (apart.py).
"""

from __future__ import annotations

from incipit.backbones import CausalBackbone, EncoderBackbone, EncoderDecoderBackbone
from incipit.serve.asks import Ask, Sampling


class _Here:
    """What executors of this process share."""

    process = 0

    def rest(self) -> None:
        """Nothing can have happened to it."""


class CausalRoom(_Here):
    """slots: rows at once. room: positions of input and answer that a row may have; 0: as many as the model has."""

    chunks = True

    def __init__(
        self, backbone: CausalBackbone, *, rows: int = 34, room: int = 0, batched: bool = True
    ) -> None:
        self.backbone, self.batched, self.shares = backbone, batched, backbone.shares
        self.mode = "batched" if batched else "rows"
        self.slots = rows
        self.room = room or min(backbone.geometry.max_length or 4096, 4096)
        self.tokens = rows * self.room

    def fits(self, ask: Ask) -> str:
        """Why a request can never be served here; "" when it can."""
        prompt = ask.version.length if ask.version is not None else 0
        most, own = self.backbone.geometry.max_length, len(ask.ids)
        if isinstance(ask.do, Sampling):
            own += ask.do.max_new_tokens
        else:
            own = max(len(i) for i in ask.do.inputs or (ask.ids,)) + max(map(len, ask.do.ends))
        if most and prompt + own > most:
            return (
                f"a prompt of {prompt} positions, an input of {len(ask.ids)} tokens and the answer make "
                f"{prompt + own}; backbone {self.backbone.name!r} has {most}: shorten the input or the answer"
            )
        own += self._front(ask)
        if own > self.room:
            return f"input and answer make {own} positions, a slot here has {self.room}: shorten one of them"
        return ""

    def cost(self, ask: Ask) -> int:
        """Positions that a request may take at most."""
        if isinstance(ask.do, Sampling):
            return self._front(ask) + len(ask.ids) + ask.do.max_new_tokens
        return sum(map(len, ask.do.inputs)) + len(ask.ids) + sum(map(len, ask.do.ends))

    def _front(self, ask: Ask) -> int:
        """Positions of a slot that the prompt takes: none where the model shares it."""
        return ask.version.length if ask.version is not None and not self.backbone.shares else 0


class EncoderDecoderRoom(_Here):
    """slots: rows at once. room: positions of prompt and input; answer: new tokens that a row may write."""

    chunks = False  # an encoder sees its input whole
    shares = False

    def __init__(
        self,
        backbone: EncoderDecoderBackbone,
        *,
        rows: int = 34,
        room: int = 0,
        answer: int = 256,
        batched: bool = True,
    ) -> None:
        self.backbone, self.batched = backbone, batched
        self.mode = "batched" if batched else "rows"
        self.slots, self.answer = rows, answer
        self.room = room or 2 * (backbone.space or 512)
        self.tokens = rows * (self.room + answer)

    def fits(self, ask: Ask) -> str:
        """Why a request can never be served here; "" when it can."""
        read = len(ask.ids) + (ask.version.length if ask.version is not None else 0)
        most = min(self.room, self.backbone.geometry.max_length or self.room)
        if read > most:
            return f"prompt and input make {read} positions, there is room for {most}: shorten the input"
        most = min(self.answer, self.backbone.geometry.max_length or self.answer)
        if isinstance(ask.do, Sampling) and ask.do.max_new_tokens > most:
            return (
                f"max_new_tokens = {ask.do.max_new_tokens}, an answer here has at most {most}: ask for fewer"
            )
        return ""

    def cost(self, ask: Ask) -> int:
        """Positions that a request may take at most."""
        read = len(ask.ids) + (ask.version.length if ask.version is not None else 0)
        return read + (ask.do.max_new_tokens if isinstance(ask.do, Sampling) else sum(map(len, ask.do.ends)))


class EncoderRoom(_Here):
    """slots: requests that one pass may hold; they take no memory between passes."""

    chunks = False
    shares = False

    def __init__(self, backbone: EncoderBackbone, *, rows: int = 34, batched: bool = True) -> None:
        self.backbone, self.batched = backbone, batched
        self.mode = "batched" if batched else "rows"
        self.slots, self.tokens = rows, rows * (backbone.space or 512)

    def fits(self, ask: Ask) -> str:
        """Why a request can never be served here; "" when it can."""
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
        """Positions that a request may take at most."""
        return len(ask.ids) + (ask.version.length if ask.version is not None else 0)
