"""Answers in OpenAI's shapes: whole, and piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from incipit.backbones import Backbone
from incipit.serve.asks import Delta, End


@dataclass(frozen=True)
class Head:
    """What every message of one answer repeats."""

    id: str
    created: int
    model: str
    fingerprint: str

    def of(self, kind: str, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """A message."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint or None,
            "choices": list(choices),
            **more,
        }


def usage(ends: Sequence[End], n: int = 1) -> dict[str, Any]:
    """Counts of tokens. Rows of the soft prompt are read too, and cost nothing anew: they count as cached. What n
    answers read counts once, as at OpenAI."""
    asked, written = ends[::n], sum(end.new_tokens for end in ends)
    soft = sum(end.prompt_tokens for end in asked)
    read = soft + sum(end.input_tokens for end in asked)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": soft},
    }


class Form:
    """How one of the two endpoints writes its choices. whole, piece: the `object` of a message."""

    whole: str
    piece: str
    prefix: str

    def __init__(self, backbone: Backbone, logprobs: bool) -> None:
        self.backbone, self.logprobs = backbone, logprobs

    def choice(self, index: int, deltas: Sequence[Delta], end: End) -> dict[str, Any]:
        """A finished choice."""
        raise NotImplementedError

    def first(self, index: int) -> dict[str, Any] | None:
        """What opens a streamed choice; None for nothing."""
        return None

    def step(self, index: int, delta: Delta) -> dict[str, Any]:
        """New text of a streamed choice."""
        raise NotImplementedError

    def last(self, index: int, end: End) -> dict[str, Any]:
        """What closes a streamed choice."""
        raise NotImplementedError

    def pieces(self, deltas: Sequence[Delta]) -> list[tuple[str, float]]:
        """Each token as the vocabulary writes it, with its log-probability."""
        pairs = [(t, p) for delta in deltas for t, p in zip(delta.tokens, delta.logprobs, strict=True)]
        return [(self.backbone.piece(token), log) for token, log in pairs]


class Text(Form):
    """/v1/completions."""

    whole, piece, prefix = "text_completion", "text_completion", "cmpl-"

    def choice(self, index: int, deltas: Sequence[Delta], end: End) -> dict[str, Any]:
        """A finished choice."""
        text = "".join(delta.text for delta in deltas) + end.text
        return self._message(index, text, self._logs(deltas), end)

    def step(self, index: int, delta: Delta) -> dict[str, Any]:
        """New text of a streamed choice."""
        return self._message(index, delta.text, self._logs([delta]), None)

    def last(self, index: int, end: End) -> dict[str, Any]:
        """What closes a streamed choice."""
        return self._message(index, end.text, None, end)

    def _message(self, index: int, text: str, logs: Any, end: End | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logs, **_finish(end)}

    def _logs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        pieces = self.pieces(deltas)
        return {
            "tokens": [piece for piece, _ in pieces],
            "token_logprobs": [log for _, log in pieces],
            "top_logprobs": None,
            "text_offset": None,
        }


class Chat(Form):
    """/v1/chat/completions."""

    whole, piece, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def choice(self, index: int, deltas: Sequence[Delta], end: End) -> dict[str, Any]:
        """A finished choice."""
        text = "".join(delta.text for delta in deltas) + end.text
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logs(deltas), **_finish(end)}

    def first(self, index: int) -> dict[str, Any] | None:
        """What opens a streamed choice."""
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def step(self, index: int, delta: Delta) -> dict[str, Any]:
        """New text of a streamed choice."""
        return self._delta(index, {"content": delta.text}, self._logs([delta]), None)

    def last(self, index: int, end: End) -> dict[str, Any]:
        """What closes a streamed choice."""
        return self._delta(index, {"content": end.text} if end.text else {}, None, end)

    def _delta(self, index: int, delta: Mapping[str, str], logs: Any, end: End | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logs, **_finish(end)}

    def _logs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        pieces = self.pieces(deltas)
        return {
            "content": [
                {"token": piece, "logprob": log, "bytes": list(piece.encode()), "top_logprobs": []}
                for piece, log in pieces
            ]
        }


def _finish(end: End | None) -> dict[str, Any]:
    """Why a choice is at its end; stop_reason as in vLLM: the stop text or token that ended it."""
    if end is None:
        return {"finish_reason": None}
    return {"finish_reason": end.reason, "stop_reason": end.stopped_by}


# -- for the OpenAPI description -------------------------------------------------------------------------------


class Usage(BaseModel):
    """Counts of tokens; `cached_tokens` are the rows of the soft prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Reply(BaseModel):
    """What the two writing endpoints share. system_fingerprint: name@version of the prompt that answered."""

    id: str
    created: int
    model: str
    system_fingerprint: str | None
    usage: Usage


class TextChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None


class CompletionReply(Reply):
    """POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ChatChoice(BaseModel):
    """One answer of the assistant."""

    index: int
    message: dict[str, Any]
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None


class ChatReply(Reply):
    """POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Label(BaseModel):
    """One classified input. seconds: from submit to the answer, in the engine."""

    index: int
    label: str
    probabilities: dict[str, float]
    seconds: float


class ClassifyReply(BaseModel):
    """POST /v1/classify."""

    id: str
    object: Literal["classification"]
    created: int
    model: str
    system_fingerprint: str | None
    data: list[Label]
    usage: Usage
