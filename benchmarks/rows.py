"""Rows of a workload: lengths like those of real sentences, ids at random, all from one seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import torch

from incipit.batch import Encoded

SIGMA = 0.39  # of the logarithm: 32 lengths of mean 27 then have their maximum at 58, as in the prototype
FIRST_ID = 16  # ids below belong to special pieces
LEAST = 4


def lengths(count: int, mean: float, *, seed: int = 0) -> list[int]:
    """The `count` quantiles of a log-normal distribution of this mean, in a seeded order."""
    mu = math.log(mean) - SIGMA**2 / 2
    found = [
        max(LEAST, round(math.exp(mu + SIGMA * NormalDist().inv_cdf((i + 0.5) / count))))
        for i in range(count)
    ]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [found[i] for i in order]


def causal(settings: Mapping[str, Any], vocab: int, *, seed: int = 0) -> list[Encoded]:
    """Rows of `mean` tokens, of which the last `labels` (0: every one) carry loss."""
    return [
        Encoded(ids[:cut], ids[cut:])
        for ids in _ids(settings, vocab, seed)
        for cut in [max(0, len(ids) - settings["labels"]) if settings["labels"] else 0]
    ]


def paired(settings: Mapping[str, Any], vocab: int, *, seed: int = 0) -> list[Encoded]:
    """Inputs of `mean` tokens and targets of `labels` tokens, for an encoder-decoder."""
    targets = torch.Generator().manual_seed(seed + 1)
    return [
        Encoded(ids, tuple(torch.randint(FIRST_ID, vocab, (settings["labels"],), generator=targets).tolist()))
        for ids in _ids(settings, vocab, seed)
    ]


def asked(settings: Mapping[str, Any], vocab: int, *, seed: int = 0) -> list[Encoded]:
    """Rows without a target: what is read before something is scored or written."""
    return [Encoded(ids) for ids in _ids(settings, vocab, seed)]


def tokens(encoded: list[Encoded]) -> int:
    """Sum of the rows' lengths."""
    return sum(len(e.input_ids) + len(e.target_ids) for e in encoded)


def _ids(settings: Mapping[str, Any], vocab: int, seed: int) -> list[tuple[int, ...]]:
    source = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(FIRST_ID, vocab, (n,), generator=source).tolist())
        for n in lengths(settings["batch"], settings["mean"], seed=seed)
    ]
