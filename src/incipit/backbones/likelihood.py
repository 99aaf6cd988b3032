"""-log p(label | state) under a frozen output layer, some states at a time, each with its gradient.

# M states, V words
The layer learns nothing, so only the gradient of the states is asked for: it is made at once, while the logits [m, V]
of a few states are at hand, and no [M, V] stands in memory between forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from incipit.backbones.base import widened
from incipit.backbones.internals import Head
from incipit.backbones.reordered import Reordered

HELD = 2**22  # logits that are held at a time
LEAST = 64  # states of a piece: with fewer, the weights are read from memory too often


class _LabelLoss(torch.autograd.Function):
    """The output layer takes no gradient, and no second derivative is made."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, labels: Tensor, head: Head) -> Tensor:
        step = max(LEAST, HELD // head.layer.weight.shape[0])
        found, slopes = list[Tensor](), list[Tensor]()
        for some, names in zip(states.split(step), labels.split(step), strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                own = some.detach().requires_grad_(ctx.needs_input_grad[0])
                logits = head(
                    own.view_as(own)
                )  # not a leaf, which torch's own counters of operations cannot follow
                each = F.cross_entropy(widened(logits), names, reduction="none")
                if ctx.needs_input_grad[0]:
                    slopes += torch.autograd.grad(each.sum(), own)
            found.append(each.detach())
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grad[:, None]).to(slope.dtype), None, None


def label_nll(states: Tensor, labels: Tensor, head: Head) -> Tensor:
    """nll [M] of labels [M] after states [M, H]; in float32 or wider, differentiable in the states (once)."""
    if not _frozen(head.layer):
        return F.cross_entropy(widened(head(states)), labels, reduction="none")
    nll: Tensor = _LabelLoss.apply(states, labels, head)  # type: ignore[no-untyped-call]
    return nll


def _frozen(layer: Any) -> bool:
    """Whether the layer is a plain one that learns nothing: an adapter, or a hook, may hide what does."""
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    return (
        type(layer) is nn.Linear
        and not any(p.requires_grad for p in layer.parameters())
        and all(isinstance(hook, Reordered) for hook in hooks)
        and "forward" not in vars(layer)
    )
