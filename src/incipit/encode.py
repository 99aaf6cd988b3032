"""Examples -> token ids for one backbone: the place where words meet tokens."""

from __future__ import annotations

from collections.abc import Sequence

from incipit.backbones import Backbone
from incipit.batch import Encoded
from incipit.tasks.example import Example


def encode(backbone: Backbone, example: Example, *, room: int = 0, end: bool = True) -> Encoded:
    """The example with its target; `room` positions are left to the prompt, `end` closes the target."""
    if example.messages:
        messages = [{"role": m.role, "content": m.content} for m in example.messages]
        return backbone.encode_chat(messages, room=room, source=example.source)
    return question(backbone, example, room=room, answer=example.target, end=end)


def question(
    backbone: Backbone, example: Example, *, room: int = 0, answer: str = "", end: bool = False
) -> Encoded:
    """The example without its own target: what is asked, and one candidate answer to score (or none)."""
    if example.messages:
        messages = [{"role": m.role, "content": m.content} for m in example.messages[:-1]]
        return backbone.encode_asked(messages, room=room, source=example.source)
    return backbone.encode(
        example.input,
        answer,
        choice=example.choice,
        end=end,
        room=room,
        source=example.source,
        spare=example.worked,
    )


def questions(
    backbone: Backbone, example: Example, answers: Sequence[str], *, room: int = 0, end: bool = False
) -> list[Encoded]:
    """The same for several candidate answers, with the input made token ids once."""
    if example.messages:
        return [question(backbone, example, room=room)] * len(answers)
    return backbone.encode_each(
        example.input,
        answers,
        choice=example.choice,
        end=end,
        room=room,
        source=example.source,
        spare=example.worked,
    )
