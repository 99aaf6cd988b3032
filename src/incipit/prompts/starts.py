"""Initial values: which pieces of the vocabulary a soft row starts at.

Every start but `uniform`, `normal` and `given` first chooses, per row, a list of token ids ("slot"); an input prompt
starts a row at the mean of their embeddings, a prefix prompt runs the ids through the model and starts at
real activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from incipit.errors import PromptError

STARTS = ("label", "vocabulary", "text", "uniform", "normal", "given")
PAPER_RMS = 10.0  # embedding RMS of the T5 1.1 models for which the paper's numbers 0.3 and 0.5 were chosen
Slots = list[list[int]]


def sampled(frequent: Sequence[int], length: int, seed: int) -> Slots:
    """`length` distinct ids drawn from the most frequent pieces (with repeats only when there are too few).

    Lester et al. 2021, section 3.2: sampled vocabulary, from the 5,000 most common pieces.
    """
    if not frequent:
        raise PromptError("the vocabulary has no ordinary pieces to sample from: use the start 'uniform'")
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < length:
        order += torch.randperm(len(frequent), generator=generator).tolist()
    return [[frequent[i]] for i in order[:length]]


def labelled(pieces: Sequence[Sequence[int]], rest: Slots) -> Slots:
    """One row per label (the mean of its pieces), the other rows from `rest`; needs no more labels than rows.

    Lester et al. 2021, section 3.2: class labels first, sampled vocabulary after.
    """
    if not pieces:
        raise PromptError(
            "the start 'label' needs label words: this task has none; use 'vocabulary' or 'text'"
        )
    if len(pieces) > len(rest):
        raise PromptError(
            f"the start 'label' needs a row for each of {len(pieces)} labels, the prompt has "
            f"{len(rest)}: raise prompt.length or use 'vocabulary'"
        )
    return [list(p) for p in pieces] + rest[len(pieces) :]


def worded(ids: Sequence[int], rest: Slots) -> Slots:
    """One row per piece of a text, cut at the prompt's length; the other rows from `rest`."""
    if not ids:
        raise PromptError("the start 'text' needs prompt.text: write a description of the task there")
    return ([[i] for i in ids] + rest[len(ids) :])[: len(rest)]


def uniform(length: int, width: int, rms: float, seed: int) -> Tensor:
    """U[-0.5, 0.5] x rms / 10, [P, W]: the paper's uniform start at the backbone's own scale.

    Lester et al. 2021, section 3.2, where embeddings have an RMS near 10.
    """
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(length, width, generator=generator) - 0.5) * (rms / PAPER_RMS)


def normal(length: int, width: int, rms: float, seed: int) -> Tensor:
    """N(0, rms^2), [P, W]: random numbers of the size of the embeddings, 35 times that of the uniform start."""
    return torch.randn(length, width, generator=torch.Generator().manual_seed(seed)) * rms


DRAWN = {"uniform": uniform, "normal": normal}  # starts that no piece of the vocabulary has a part in
