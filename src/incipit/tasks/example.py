"""Example: one thing to learn from, as words; no tokens, no tensors.

A record {"text": "Fine film.", "label": 1} with input "Review: {text}", labels negative and positive, is

    Example(input="Review: Fine film.", target="positive", choices=("negative", "positive"), choice=1,
            references=("positive",), source="train.jsonl:1")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a chat. role: one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One example.

    input, target: what the model reads and what it must write; both "" in a chat.
    choices: the legal targets (label words, or the options of this question); () for free text.
    choice: index of the target in choices. references: all accepted answers; the first is the target.
    messages: the turns of a chat, the last by the assistant. source: "file:line", for messages to the user.
    group: what examples of one question share, for metrics that judge them together; "" where none does.
    worked: letters at the start of the input that are worked examples; they go first where it is too long.
    """

    input: str
    target: str
    choices: tuple[str, ...] = ()
    choice: int | None = None
    references: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    source: str = ""
    group: str = ""
    worked: int = 0

    def canonical(self) -> dict[str, Any]:
        """The example as a JSON value without its source, so that a moved file has the same hash."""
        value = {**vars(self), "messages": tuple(map(vars, self.messages))}
        del value["source"], value["worked"]  # the input itself holds the worked examples
        if not self.group:  # so that the hash of other data is what it was before there were groups
            del value["group"]
        return value

    def answers(self) -> tuple[str, ...]:
        """Every text that counts as right: the references, else the target, else a chat's last turn."""
        if self.references:
            return self.references
        return (self.messages[-1].content,) if self.messages else (self.target,)
