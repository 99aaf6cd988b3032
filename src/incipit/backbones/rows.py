"""Rows without gaps: whatever the padding side and prompt lengths, a row becomes [prompt, text, padding], or
[text, prompt, padding] where the prompt stands behind.

# B batch, K prompts, N all slots, S longest row, H hidden
Default positions, causal masks and sliding windows of any model are then right as they stand, and a row's
result cannot depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from incipit.injection import Injection


def compact(
    mask: Tensor, *parts: Tensor, side: str = "right", ranks: Tensor | None = None
) -> tuple[Tensor, ...]:
    """mask [B, N] bool and parts [B, N, ...] -> the same with all live slots moved together, cut to the
    longest row.

    side: where the padding goes ("right" for scoring, "left" for generation). ranks [B, N] uint8 below 255: slots of
    a lower one stand before those of a higher one; without it all keep their order.
    """
    if ranks is not None:
        key = ranks.masked_fill(~mask, 255) if side == "right" else (ranks + 1).masked_fill(~mask, 0)
    else:
        key = (~mask if side == "right" else mask).to(torch.uint8)
    order = torch.argsort(key, dim=1, stable=True)  # [B, N]
    longest = int(mask.sum(dim=1).max()) if mask.numel() else 0
    order = order[:, :longest] if side == "right" else order[:, order.shape[1] - longest :]  # [B, S]
    moved = [_take(part, order) for part in parts]
    return mask.gather(1, order), *moved


def right_aligned(
    live: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """live [K, P], keys and values per layer [K, N, P, D] -> the same with dead positions moved to the front.

    Sliding windows count slots, so a hole between prompt and text would shorten what the text sees.
    """
    order = torch.argsort(live.to(torch.uint8), dim=1, stable=True)  # [K, P]
    if not live.numel() or torch.equal(
        order, torch.arange(live.shape[1], device=live.device).expand_as(order)
    ):
        return live, tuple(keys), tuple(values)

    def moved(tensor: Tensor) -> Tensor:
        return tensor.gather(2, order[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))

    return live.gather(1, order), tuple(map(moved, keys)), tuple(map(moved, values))


def last_apart(injection: Injection) -> tuple[Injection | None, Injection]:
    """Input rows [K, P, H] -> (all but the last live one of each prompt, those last ones [K, 1, H])."""
    assert injection.inputs is not None and injection.live is not None
    live, inputs = compact(injection.live, injection.inputs, side="left")  # live rows stand last
    last = replace(injection, inputs=inputs[:, -1:], live=live[:, -1:], keys={}, values={}, key_live=None)
    if inputs.shape[1] > 1:
        return replace(injection, inputs=inputs[:, :-1], live=live[:, :-1]), last
    return (replace(injection, inputs=None, live=None) if injection.keys else None), last


def seen(mask: Tensor, own: Tensor, within: str) -> Tensor:
    """What slot q of a row may look at, [B, 1, S (q), S] bool: all live ones (mask [B, S]); but one of the prompt (own
    [B, S]) of the prompt those before it ("before") or itself ("itself")."""
    slots = torch.arange(mask.shape[1], device=mask.device)
    allowed = slots[:, None] >= slots if within == "before" else slots[:, None] == slots  # [S, S]
    both = own[:, :, None] & own[:, None]
    found = mask[:, None] & (allowed | ~both)
    return (found | (slots[:, None] == slots))[:, None]  # a dead slot looks at itself, not at nothing


def _take(part: Tensor, order: Tensor) -> Tensor:
    if part.dim() == 2:
        return part.gather(1, order)
    return part.gather(1, order[..., None].expand(-1, -1, part.shape[2]))  # [B, S, H]
