"""Attention of a batch after prefixes that stand once each: softmax([q Kp^T, q K^T]) [Vp; V], in two parts.

# B rows, K prompts, N key/value heads, G query heads of each, Q queries, S own keys, P length, D head dim
Rows that read the same prompt are neighbours (`grouped`), so that its part is one product; an expanded cache would
hold and read it once for every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """`rows` neighbouring rows for each of `prompts` neighbouring prompts, from row `start` and prompt `first` on."""

    start: int
    first: int
    prompts: int
    rows: int

    @property
    def span(self) -> slice:
        """Its rows."""
        return slice(self.start, self.start + self.prompts * self.rows)


@dataclass(frozen=True)
class Shared:
    """Keys and values [K, N, P, D] of one layer. seen: whether every query sees all of them."""

    keys: Tensor
    values: Tensor
    groups: tuple[Group, ...]
    seen: bool


def grouped(rows: Sequence[int], repeats: int = 1) -> tuple[list[int], list[int], tuple[Group, ...]]:
    """(order of the rows, the prompts that they read, groups) with prompts of equally many rows side by side.

    repeats: how often every row stands in the batch that attention sees (beams).
    """
    by_prompt: dict[int, list[int]] = {}
    for row, prompt in enumerate(rows):
        by_prompt.setdefault(prompt, []).append(row)
    prompts = sorted(by_prompt, key=lambda k: len(by_prompt[k]))
    groups: list[Group] = []
    start = 0
    for first, prompt in enumerate(prompts):
        count = len(by_prompt[prompt]) * repeats
        if groups and groups[-1].rows == count:
            last = groups.pop()
            groups.append(Group(last.start, last.first, last.prompts + 1, count))
        else:
            groups.append(Group(start, first, 1, count))
        start += count
    return [row for k in prompts for row in by_prompt[k]], prompts, tuple(groups)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared: Shared,
    mask: Tensor | None,
    scaling: float,
    cap: float | None,
) -> Tensor:
    """query [B, N * G, Q, D], key and value [B, N, S, D], mask [1|B, 1, Q, P + S] of what is seen -> [B, Q, N * G, D].

    Without a mask the queries are the last of the keys, in their order.
    """
    batch, (heads, queries) = key.shape[0], query.shape[1:3]
    query, key = query.to(value.dtype), key.to(value.dtype)
    length = shared.keys.shape[2]
    q = (query * scaling).view(batch, key.shape[1], -1, queries, query.shape[-1])  # [B, N, G, Q, D]
    if mask is None:
        own_mask = torch.ones(1, 1, queries, key.shape[2], dtype=torch.bool, device=key.device)
        own_mask = own_mask.tril(key.shape[2] - queries)
    else:
        own_mask = mask[..., length:]
    own = _scores((q.flatten(2, 3) @ key.mT).view(*q.shape[:4], -1), cap, own_mask[:, :, None])
    top = own.amax(dim=-1, keepdim=True)  # [B, N, G, Q, 1]
    far: list[Tensor] = []
    for group in shared.groups:
        part = _grouped(q[group.span], group)  # [K, N, rows, G, Q, D]
        kp = shared.keys[group.first : group.first + group.prompts]
        front = None
        if mask is not None and not shared.seen:
            front = mask[..., :length].expand(batch, -1, -1, -1)[group.span, :, None]
            front = _grouped(front, group)  # [K, 1, rows, 1, Q, P]
        scores = (part.flatten(2, 4) @ kp.mT).view(*part.shape[:5], -1)
        far.append(_scores(scores, cap, front))
        there = _grouped(top[group.span], group)
        there.copy_(torch.maximum(there, far[-1].amax(dim=-1, keepdim=True)))
    own = own.sub_(top).exp_()
    total = own.sum(dim=-1, keepdim=True)
    out = (own.to(value.dtype).flatten(2, 3) @ value).view(*q.shape[:4], -1)  # [B, N, G, Q, D]
    for group, scores in zip(shared.groups, far, strict=True):
        scores = scores.sub_(_grouped(top[group.span], group)).exp_()
        vp = shared.values[group.first : group.first + group.prompts]
        _grouped(total[group.span], group).add_(scores.sum(dim=-1, keepdim=True))
        mixed = (scores.to(value.dtype).flatten(2, 4) @ vp).view(*scores.shape[:5], -1)
        _grouped(out[group.span], group).add_(mixed)
    return out.div_(total).view(batch, heads, queries, -1).transpose(1, 2).to(query.dtype)


def _scores(scores: Tensor, cap: float | None, seen: Tensor | None) -> Tensor:
    """Scores in float32 or wider, the unseen at the least number: a padding row that sees nothing stays finite."""
    wide = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
    if cap is not None:
        wide = wide.div_(cap).tanh_().mul_(cap)
    return wide if seen is None else wide.masked_fill_(~seen, torch.finfo(wide.dtype).min)


def _grouped(tensor: Tensor, group: Group) -> Tensor:
    """A view [K, N, rows, ...] of [K * rows, N, ...]."""
    return tensor.view(group.prompts, group.rows, *tensor.shape[1:]).transpose(1, 2)
