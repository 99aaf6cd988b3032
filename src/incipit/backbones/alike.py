"""q, k, v = W x_d of the distinct slots d alone: what enters the first layer alike is projected once.

# M slots of a stream, X chunks of C of them, D distinct slots, H hidden
Where positions are relative, a slot enters as a row of the table or of a prompt and nothing else: a prompt of P rows
stands before every text of a pass, and words come again. The gradient of what they share is summed before the product.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from incipit.backbones import internals

WORTH = 0.75  # share of distinct slots up to which gathering them takes less time than it saves


@dataclass(frozen=True)
class Alike:
    """first [D]: one slot of each kind. kind [X, C]: the kind of each slot, so that x[first][kind] = x."""

    first: Tensor
    kind: Tensor


_now: ContextVar[Alike | None] = ContextVar("incipit_alike", default=None)


def found(names: Tensor, chunk: int) -> Alike | None:
    """Slots by their names [M], equal where they enter alike, in chunks of C; None where too few of them are.

    What fills the last chunk is taken for one more kind.
    """
    names = F.pad(names, (0, -len(names) % chunk), value=-1)
    kinds, kind = names.unique(return_inverse=True)
    if len(kinds) > WORTH * len(names):
        return None
    slots = torch.arange(len(names), device=names.device)
    first = slots.new_full((len(kinds),), len(names)).scatter_reduce(0, kind, slots, "amin")
    return Alike(first, kind.unflatten(0, (-1, chunk)))


def share(attention: nn.Module) -> None:
    """Let this first attention project what is alike once, in calls whose `incipit_stream` says what is."""
    attention.register_forward_pre_hook(_begun, with_kwargs=True)
    attention.register_forward_hook(_done, always_call=True)
    for layer in internals.projections(attention):
        layer.register_forward_pre_hook(_fewer, prepend=True)  # before what reordered.py hands on
        layer.register_forward_hook(_again)


def _begun(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    _now.set(getattr(kwargs.get("incipit_stream"), "alike", None))


def _done(module: nn.Module, args: Any, output: Any) -> None:
    _now.set(None)


def _fewer(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """[X, C, H] -> [D, H]; once, where the model was wrapped twice."""
    alike = _now.get()
    if alike is None or args[0].shape[:-1] != alike.kind.shape:
        return None
    return (F.embedding(alike.first, args[0].flatten(0, 1)),)


def _again(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """[D, H] -> [X, C, H]; by `embedding`, whose backward sums rows faster than that of an index."""
    alike = _now.get()
    if alike is None or output.shape[:-1] != alike.first.shape:
        return None
    return F.embedding(alike.kind, output)
