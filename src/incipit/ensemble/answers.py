"""What K prompts say to B inputs: K · B rows in shared batches over one frozen model.

# B examples, K prompts, C choices
Lester et al. 2021, section 6: one example is replicated K times, each row is given its own prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from incipit.backbones import Backbone, GenerateOptions
from incipit.decode import Prediction, Prefixes, predict_all, ranked, score_all
from incipit.errors import PromptError
from incipit.prompts import Prompt
from incipit.tasks.example import Example


@dataclass(frozen=True)
class Answers:
    """predictions [K][B]. scores [K][B][C]: of the choices, before the softmax; None where answers were written."""

    predictions: list[list[Prediction]]
    scores: list[list[list[float]]] | None

    @property
    def count(self) -> int:
        """K."""
        return len(self.predictions)


def ask(
    backbone: Backbone,
    prompts: Sequence[Prompt | None],
    examples: Sequence[Example],
    *,
    mode: str = "auto",
    options: GenerateOptions | None = None,
    batch: int = 64,
    prefixes: Prefixes | None = None,
) -> Answers:
    """Every prompt's answer to every example. mode: "rank", "generate", or "auto" (ranks where all have choices).

    batch: rows of a pass, whatever the number of prompts, so that K prompts need the memory of one. Raises PromptError
    without a prompt.
    """
    if not prompts:
        raise PromptError("an ensemble of no prompts answers nothing: give two or more")
    if mode == "rank" or (mode == "auto" and all(e.choices for e in examples)):
        scores = score_all(backbone, prompts, examples, batch=batch, prefixes=prefixes)
        found = [[ranked(e, one) for e, one in zip(examples, own, strict=True)] for own in scores]
        return Answers(found, scores)
    predictions = predict_all(
        backbone, prompts, examples, mode=mode, options=options, batch=batch, prefixes=prefixes
    )
    return Answers(predictions, None)
