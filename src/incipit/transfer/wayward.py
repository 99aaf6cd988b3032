"""A prompt that stays near a text while it learns: the wayward regulariser.

# P length, H hidden
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from incipit.batch import Batch
from incipit.errors import PromptError
from incipit.prompts import Prompt
from incipit.train.gradients import Objective


def pulled(
    objective: Objective,
    prompts: Sequence[Prompt | None],
    anchors: Sequence[Tensor | None],
    gammas: Sequence[float],
) -> Objective:
    """L = nll + gamma / P * sum ||(p_i - e_i) / rms||^2, e_i the start of row i: an Objective for the one loop.

    Khashabi et al. 2022 ("prompt waywardness"), as in the code of Lester et al. 2021 (extended/train/wayward.py), whose
    gamma 0.01 belongs to plain distances at an embedding RMS near 10: that is gamma = 1 here. anchors: e [P, H] of each
    prompt, None for a prompt that is free. Every row of a batch carries the penalty times its label tokens, so the mean
    over a step's tokens holds it once.
    """
    for prompt, anchor, gamma in zip(prompts, anchors, gammas, strict=True):
        if gamma and (prompt is None or anchor is None or soft(prompt).shape != anchor.shape):
            raise PromptError(
                "a prompt is pulled to as many embedded rows as it has: give an anchor of its shape, or gamma 0"
            )

    def nll(batch: Batch) -> tuple[Tensor, Tensor]:
        total, count = objective(batch)
        for k in batch.rows.unique().tolist():
            prompt, anchor, gamma = prompts[k], anchors[k], gammas[k]
            if not gamma or prompt is None or anchor is None:
                continue
            rows = soft(prompt)
            unit = unit_of(prompt)
            away = ((rows - anchor.to(rows)) / unit).square().sum() / len(anchor)
            mine = (batch.rows == k).to(total.device)
            total = total + mine * count.to(total.dtype) * gamma * away.to(total.dtype)
        return total, count

    return nll


def soft(prompt: Prompt) -> Tensor:
    """The rows [P, H] that are trained, differentiable."""
    inner: Any = prompt
    while not callable(getattr(inner, "rows", None)):
        inner = inner.inner
    rows: Tensor = inner.rows()
    return rows


def unit_of(prompt: Prompt) -> float:
    """The embedding RMS of the backbone that the prompt was made for."""
    inner: Any = prompt
    while not hasattr(inner, "geometry"):
        inner = inner.inner
    return float(inner.geometry.embedding_rms)
