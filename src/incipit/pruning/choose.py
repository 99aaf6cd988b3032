"""Which tokens and pieces are kept at a ratio, and the masks that a choice is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from incipit.errors import PromptError
from incipit.pruning.scores import Scores


def kept_of(count: int, ratio: float) -> int:
    """max(1, n - floor(n r)): how many of n are kept when the share r is pruned."""
    return max(1, count - int(count * ratio + 1e-9))  # 20 * 0.15 is 3 and not 2.999...


def fitting(scores: Scores, token_ratio: float, piece_ratio: float) -> Tensor:
    """Mask [P, k]: the tokens with the highest scores, and in each of them its pieces with the highest scores.

    Ma et al. 2022, figures 9 and 10: tokens are ranked among all, pieces within their token, and every surviving token
    keeps the same number of pieces. Of equal scores the first is kept.
    """
    length, pieces = scores.pieces.shape
    tokens = _top(scores.tokens[None], kept_of(length, token_ratio))[0]  # [P]
    return tokens[:, None] & _top(scores.pieces, kept_of(pieces, piece_ratio))  # [P, k]


def _top(scores: Tensor, count: int) -> Tensor:
    """The `count` highest of each row, as a mask of the same shape."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)


def random_like(mask: Tensor, seed: int) -> Tensor:
    """As many tokens, and in each as many pieces, at random."""
    source = torch.Generator().manual_seed(seed)
    counts = [n for n in mask.sum(dim=1).tolist() if n]
    found = torch.zeros_like(mask)
    for token, count in zip(torch.randperm(len(mask), generator=source).tolist(), counts, strict=False):
        found[token, torch.randperm(mask.shape[1], generator=source)[:count]] = True
    return found


def reverse(mask: Tensor) -> Tensor:
    """Keeps exactly what the mask prunes. Raises PromptError where that is nothing."""
    if bool(mask.all()):
        raise PromptError(
            "a mask that prunes nothing has no reverse: raise a ratio, or leave the control out"
        )
    return ~mask
