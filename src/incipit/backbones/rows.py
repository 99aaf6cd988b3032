"""Rows without gaps: whatever the padding side and prompt lengths, a row becomes [prompt, text, padding].

# B batch, N all slots, S longest row, H hidden
Default positions, causal masks and sliding windows of any model are then right as they stand, and a row's result
cannot depend on its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compact(mask: Tensor, *parts: Tensor, side: str = "right") -> tuple[Tensor, ...]:
    """mask [B, N] bool and parts [B, N, ...] -> the same with all live slots moved together, cut to the longest row.

    side: where the padding goes ("right" for scoring, "left" for generation).
    """
    order = torch.argsort((~mask if side == "right" else mask).to(torch.uint8), dim=1, stable=True)  # [B, N]
    longest = int(mask.sum(dim=1).max()) if mask.numel() else 0
    order = order[:, :longest] if side == "right" else order[:, order.shape[1] - longest :]  # [B, S]
    moved = [_take(part, order) for part in parts]
    return mask.gather(1, order), *moved


def _take(part: Tensor, order: Tensor) -> Tensor:
    if part.dim() == 2:
        return part.gather(1, order)
    return part.gather(1, order[..., None].expand(-1, -1, part.shape[2]))  # [B, S, H]
