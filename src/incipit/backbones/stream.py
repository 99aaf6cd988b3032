"""Rows of different lengths end to end: the model sees one long row without padding, only attention knows rows.

# K prompts, M slots of the stream, N key/value heads, G query heads of each, R rows, W slots of a row, P length,
# D head dim
o = softmax([q Kp^T, q K^T]) [Vp; V]: attention in two parts. The prefix Kp, Vp stands once for each prompt, so its
part is one product over all rows that read it. Nothing is copied for a row, and nothing is computed for padding
beyond what a Block of nearly equal rows holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KEPT = 512  # rows this wide keep their attention weights for the backward pass; wider ones compute them again


@dataclass(frozen=True)
class Block:
    """`rows` rows of `width` slots for each of `prompts` prompts, from slot `start` on; `first` is the first prompt.

    In memory [prompts, rows, width]; a row shorter than `width` is padded behind.
    """

    start: int
    first: int
    prompts: int
    rows: int
    width: int

    @property
    def size(self) -> int:
        """Its slots."""
        return self.prompts * self.rows * self.width


@dataclass(frozen=True)
class Stream:
    """How rows lie in a stream. Row i of the batch begins at slot starts[i] (-1: it has no slots).

    order: the prompts that are read, as blocks count them. taken [M]: row and slot of each place, as an index into
    padded rows [B * S]. depth [M]: how far a slot stands in its text. branch [M]: 0 for the trunk of a row, else the
    continuation of it that a slot belongs to, which sees trunk and itself but no other (None: rows are trunks).
    """

    blocks: tuple[Block, ...]
    order: tuple[int, ...]
    starts: Tensor
    taken: Tensor
    depth: Tensor
    prompt: Tensor  # [M], the prompt that each slot reads, as the injection counts them
    branch: Tensor | None = None


@dataclass(frozen=True)
class Prefix:
    """Keys and values of one layer [K, N, P, D], and what is alive [K, P] (None: all); prompts in stream order.

    Dead positions stand in front, so that slot j of P stands P - j before the first slot of a row.
    """

    keys: Tensor
    values: Tensor
    live: Tensor | None


def launch_cost(weights: int, layers: int, device: torch.device) -> float:
    """What one more block costs every layer, in slots: the time of its small products over a slot's own."""
    each = 1.6e7 if device.type == "cpu" else 1.6e10  # measured on two cores; guessed for accelerators
    return float(each * layers / max(1, weights))


def lay(
    lengths: Sequence[int], rows: Sequence[int], padded: int, launch: float, device: torch.device
) -> Stream:
    """Rows of these lengths, which read these prompts and stand padded in [B, padded], as a stream.

    launch: what a further block costs, in slots. Rows of length 0 take no place.
    """
    by_prompt: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        if length:
            by_prompt.setdefault(rows[row], []).append(row)
    by_count: dict[int, list[int]] = {}
    for prompt in sorted(by_prompt):
        by_prompt[prompt].sort(key=lambda row: lengths[row])
        by_count.setdefault(len(by_prompt[prompt]), []).append(prompt)
    blocks: list[Block] = []
    placed: list[int] = []  # rows in stream order
    widths: list[int] = []
    begin = first = 0
    for count, prompts in sorted(by_count.items()):
        tops = [max(lengths[by_prompt[k][i]] for k in prompts) for i in range(count)]
        for low, high in _cuts(tops, len(prompts), launch):
            block = Block(begin, first, len(prompts), high - low, tops[high - 1])
            blocks.append(block)
            for k in prompts:
                placed += by_prompt[k][low:high]
            widths += [block.width] * (block.prompts * block.rows)
            begin += block.size
        first += len(prompts)
    order = tuple(k for _, prompts in sorted(by_count.items()) for k in prompts)
    which, width = torch.tensor(placed, dtype=torch.int64), torch.tensor(widths, dtype=torch.int64)
    ends = width.cumsum(0)
    starts = torch.full((len(lengths),), -1, dtype=torch.int64)
    starts[which] = ends - width
    depth = torch.arange(begin) - (ends - width).repeat_interleave(width)
    taken = which.repeat_interleave(width) * padded + depth
    read = torch.tensor(rows, dtype=torch.int64)[which].repeat_interleave(width)
    return Stream(tuple(blocks), order, *(t.to(device) for t in (starts, taken, depth, read)))


def _cuts(tops: Sequence[int], prompts: int, launch: float) -> Iterator[tuple[int, int]]:
    """Ranges of rising widths that together cost least: slots of each range at its greatest width, and a launch."""
    ends = [i for i in range(1, len(tops) + 1) if i == len(tops) or tops[i] > tops[i - 1]]
    ends = [e for i, e in enumerate(ends) if i % (1 + len(ends) // 48) == 0 or e == len(tops)]
    best: dict[int, tuple[float, int]] = {0: (0.0, 0)}
    for end in ends:
        best[end] = min(
            (cost + prompts * (end - begin) * tops[end - 1] + launch, begin)
            for begin, (cost, _) in best.items()
        )
    found, end = [], len(tops)
    while end:
        found.append((best[end][1], end))
        end = best[end][1]
    return reversed(found)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix | None,
    stream: Stream,
    scaling: float,
    window: int | None,
    cap: float | None,
) -> Tensor:
    """query [1, N * G, M, D], key and value [1, N, M, D] -> [1, M, N * G, D]; differentiable, also in the prefix.

    window: how far back a slot looks, itself counted (None: to the beginning). cap: scores become cap tanh(s / cap).
    """
    kind = value.dtype  # under autocast rotated queries and keys are wider than values
    given = (prefix.keys.to(kind), prefix.values.to(kind)) if prefix is not None else (None, None)
    live = prefix.live if prefix is not None else None
    out: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        query[0].to(kind), key[0].to(kind), value[0], *given, live, stream, scaling, window, cap
    )
    return out[None]


class _Attention(torch.autograd.Function):
    """Both parts over all blocks of one layer, with the gradient written out (no copy of a prefix for a row)."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        query, key, value, front, back, live, stream, scaling, window, cap = given
        heads, slots, _ = query.shape
        out: Tensor = query.new_empty(slots, heads, value.shape[-1])
        kept: list[Tensor | None] = []
        for block in stream.blocks:
            q, k, v = _views(block, query, key, value)
            q = q.contiguous().mul_(scaling) if not q.is_contiguous() else q * scaling
            k, v = k.contiguous(), v.contiguous()
            kp, vp, alive = _of_prompts(block, front, back, live)
            far, own = _weights(q, k, kp, _masks(stream, block, kp, alive, window), cap)
            mixed = (own.flatten(3, 4) @ v).unflatten(3, q.shape[3:5])  # [K, N, R, G, W, D]
            if far is not None:
                mixed += (far.flatten(2, 4) @ vp).unflatten(2, q.shape[2:5])
            _by_slot(out, block, q.shape[1]).copy_(mixed)
            kept += [q, k, v, *((far, own) if block.width <= KEPT else (None, None))]
        ctx.save_for_backward(front, back, live, out, *kept)
        ctx.rest = stream, scaling, window, cap, tuple(torch.empty_like(t, device="meta") for t in given[:3])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        front, back, live, out, *kept = ctx.saved_tensors
        stream, scaling, window, cap, like = ctx.rest
        wants = ctx.needs_input_grad
        found = [
            torch.empty_like(t, device=out.device) if w else None for t, w in zip(like, wants, strict=False)
        ]
        more = [torch.zeros_like(t) if w else None for t, w in zip((front, back), wants[3:5], strict=True)]
        delta = (grads[0] * out).sum(dim=-1, keepdim=True)  # [M, N * G, 1]
        for i, block in enumerate(stream.blocks):
            q, k, v, far, own = kept[5 * i : 5 * i + 5]
            kp, vp, alive = _of_prompts(block, front, back, live)
            if own is None:
                far, own = _weights(q, k, kp, _masks(stream, block, kp, alive, window), cap)
            d = _by_slot(grads[0], block, q.shape[1]).contiguous()  # [K, N, R, G, W, D]
            less = _by_slot(delta, block, q.shape[1])
            ds = (d.flatten(3, 4) @ v.mT).unflatten(3, q.shape[3:5]).sub_(less).mul_(own)
            ds = _uncapped(ds, q, k[:, :, :, None], cap)
            _put(found[1], block, (ds.flatten(3, 4).mT @ q.flatten(3, 4))[:, :, :, None])
            _put(found[2], block, (own.flatten(3, 4).mT @ d.flatten(3, 4))[:, :, :, None])
            dq = (ds.flatten(3, 4) @ k).unflatten(3, q.shape[3:5])
            if far is not None:
                ds = (d.flatten(2, 4) @ vp.mT).unflatten(2, q.shape[2:5]).sub_(less).mul_(far)
                ds = _uncapped(ds, q, kp[:, :, None, None], cap)
                dq += (ds.flatten(2, 4) @ kp).unflatten(2, q.shape[2:5])
                span = slice(block.first, block.first + block.prompts)
                if more[0] is not None:
                    more[0][span] += ds.flatten(2, 4).mT @ q.flatten(2, 4)
                if more[1] is not None:
                    more[1][span] += far.flatten(2, 4).mT @ d.flatten(2, 4)
            _put(found[0], block, dq.mul_(scaling))
        return *found, *more, None, None, None, None, None


def _views(block: Block, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """query [K, N, R, G, W, D], key and value [K, N, R, W, D] of a block."""
    heads, (n, r, w) = key.shape[0], (block.prompts, block.rows, block.width)
    slots = slice(block.start, block.start + block.size)
    q = query[:, slots].view(heads, -1, n, r, w, query.shape[-1]).permute(2, 0, 3, 1, 4, 5)
    k, v = (t[:, slots].view(heads, n, r, w, -1).permute(1, 0, 2, 3, 4) for t in (key, value))
    return q, k, v


def _of_prompts(block: Block, *tensors: Tensor | None) -> list[Any]:
    """What belongs to the prompts of a block."""
    return [t[block.first : block.first + block.prompts] if t is not None else None for t in tensors]


def _by_slot(out: Tensor, block: Block, heads: int) -> Tensor:
    """A view [K, N, R, G, W, D] of what [M, N * G, D] holds for a block."""
    part = out[block.start : block.start + block.size]
    part = part.view(block.prompts, block.rows, block.width, heads, -1, out.shape[-1])
    return part.permute(0, 3, 1, 4, 2, 5)


def _put(whole: Tensor | None, block: Block, part: Tensor) -> None:
    """Write a block's [K, N, R, G, W, D] into [N * G, M, D]."""
    if whole is not None:
        n, heads, r, groups, w, size = part.shape
        there = whole[:, block.start : block.start + block.size].view(heads, groups, n, r, w, size)
        there.permute(2, 0, 3, 1, 4, 5).copy_(part)


def _masks(
    stream: Stream, block: Block, front: Tensor | None, live: Tensor | None, window: int | None
) -> tuple[Tensor | None, Tensor]:
    """What is forbidden: of the prefix [K, 1, R | 1, 1, W | 1, P] (None: nothing), of the row [(K, 1, R, 1,) W, W]."""
    at = torch.arange(block.width, device=stream.depth.device)
    own = at[:, None] < at  # [W, W]
    depth = at
    if stream.branch is not None:
        slots = slice(block.start, block.start + block.size)
        shape = block.prompts, 1, block.rows, 1, block.width
        depth, branch = stream.depth[slots].view(shape), stream.branch[slots].view(shape)
        own = own | ((branch[..., None, :] != 0) & (branch[..., None, :] != branch[..., None]))
    if window is not None:
        own = own | (depth[..., None] - depth[..., None, :] >= window)
    if front is None:
        return None, own
    far = None if live is None else ~live[:, None, None, None, None, :]
    length = front.shape[2]
    if window is not None and block.width + length > window:
        gone = depth[..., None] + torch.arange(length, 0, -1, device=depth.device) >= window  # [..., W, P]
        far = gone if far is None else far | gone
    return far, own


def _weights(
    q: Tensor, k: Tensor, kp: Tensor | None, masks: tuple[Tensor | None, Tensor], cap: float | None
) -> tuple[Tensor | None, Tensor]:
    """softmax over both parts: of the prefix [K, N, R, G, W, P] (None without one), of the row [K, N, R, G, W, W]."""
    parts = [(q.flatten(3, 4) @ k.mT).unflatten(3, q.shape[3:5])]
    if kp is not None:
        parts.append((q.flatten(2, 4) @ kp.mT).unflatten(2, q.shape[2:5]))
    wide = [p.float() if p.dtype in (torch.bfloat16, torch.float16) else p for p in parts]
    if cap is not None:
        wide = [p.div_(cap).tanh_().mul_(cap) for p in wide]
    for scores, mask in zip(wide, (masks[1], masks[0]), strict=False):
        if mask is not None:
            scores.masked_fill_(mask, -torch.inf)
    top = wide[0].amax(dim=-1, keepdim=True)  # finite: a slot sees itself
    if kp is not None and kp.shape[2]:
        top = torch.maximum(top, wide[1].amax(dim=-1, keepdim=True))
    wide = [p.sub_(top).exp_() for p in wide]
    total = wide[0].sum(dim=-1, keepdim=True)
    if kp is not None:
        total += wide[1].sum(dim=-1, keepdim=True)
    own, *far = (p.div_(total).to(q.dtype) for p in wide)
    return (far[0] if far else None), own


def _uncapped(grad: Tensor, q: Tensor, k: Tensor, cap: float | None) -> Tensor:
    """Through s -> cap tanh(s / cap): grad (1 - tanh^2(q k^T / cap)); q [K, N, R, G, W, D], k broadcast to it."""
    return grad if cap is None else grad.mul_(1 - ((q @ k.mT) / cap).tanh_().square_())
