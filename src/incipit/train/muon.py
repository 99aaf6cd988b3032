"""Muon for matrices between hidden states: the momentum of the gradient, its singular values brought near 1.

Jordan et al. 2024. torch.optim.Muon multiplies in bfloat16 everywhere, which takes a processor without bfloat16
instructions some thirty times as long as float32; this one multiplies in what the hardware does fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from incipit.backbones import fastest_dtype

QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c of x <- a x + b x^3 + c x^5, steep at 0: Jordan et al. 2024


def orthogonal(matrix: Tensor, *, steps: int = 5) -> Tensor:
    """U S' V^T of matrix [R, C] = U S V^T with S' near 1, in the dtype given, by Newton-Schulz."""
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix  # [short, long]
    x = x / x.norm().clamp_min(1e-7)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT  # [short, short]
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """m = mu m + (1 - mu) g; p = (1 - lr wd) p - 0.2 sqrt(max(R, C)) lr orthogonal(mu m + (1 - mu) g), p [R, C].

    The factor makes the RMS of an update that of AdamW (Liu et al. 2025), so that both take one rate.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "the loop computes the loss"
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                mean = state["momentum_buffer"]
                mean.lerp_(param.grad, 1 - group["momentum"])
                ahead = param.grad.lerp(mean, group["momentum"])
                kind: torch.dtype = getattr(torch, fastest_dtype(param.device.type))
                rate = group["lr"] * 0.2 * max(param.shape) ** 0.5
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(orthogonal(ahead.to(kind)).to(param.dtype), alpha=-rate)
