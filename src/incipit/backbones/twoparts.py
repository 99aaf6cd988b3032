"""o = softmax([q Kp^T, q K^T]) [Vp; V]: attention in two parts over a stream, behind prompts that stand once each.

# K prompts, M slots of the stream, N key/value heads, G query heads of each, H = N * G, R rows, W slots of a row,
# P length, Q slots that read one prompt, D head dim
The prompts' part is one product over all slots that read a prompt, the rows' own part one a block of nearly equal
rows. Nothing is copied for a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from incipit.backbones.stream import Block, Readers, Stream

KEPT = 512  # scores this wide are kept for the backward pass as weights; wider ones are computed again


@dataclass(frozen=True)
class Prefix:
    """Keys and values of one layer [K, N, P, D], and what is alive [K, P] (None: all); prompts in stream order.

    Dead positions stand in front, so that slot j of P stands P - j before the first slot of a row.
    """

    keys: Tensor
    values: Tensor
    live: Tensor | None


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
    """query [1, H, M, D], key and value [1, N, M, D] -> [1, M, H, D]; differentiable, also in the prefix.

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
    """Both parts of one layer, with the gradient written out (no copy of a prefix for a row).

    e = exp(s - top) is kept, not e / total: o = (far Vp + own V) / total, and dS = e (d / total) (v - o)^T.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        query, key, value, front, back, live, stream, scaling, window, cap = given
        heads, slots, _ = query.shape
        q = torch.mul(query, scaling, out=query.new_empty(query.shape))  # contiguous, as no view here is
        masks = _Masks(stream, live, window)
        own = [_scores(_block(q, b, len(key)), _block(key, b), masks.own(b), cap) for b in stream.blocks]
        top = own[0].new_empty(heads, slots, 1)
        for block, scores in zip(stream.blocks, own, strict=True):
            _put(top, block, scores.amax(dim=-1, keepdim=True))  # finite: a slot sees itself
        top[:, stream.end :] = 0
        far: list[Tensor] = []
        if front is not None and front.shape[2]:
            for r in stream.readers:
                k = _of(front, r)
                far.append(
                    _scores(_apart(q, r, len(key)), k, masks.far(r, k.shape[2]), cap)
                )  # [K', N, G, Q, P']
            top = torch.maximum(top, _together([f.amax(dim=-1, keepdim=True) for f in far], stream))
            for r, scores in zip(stream.readers, far, strict=True):
                scores.sub_(_apart(top, r, len(key))).exp_()
            total = _together([f.sum(dim=-1, keepdim=True) for f in far], stream)  # [H, M, 1]
            far = [f.to(q.dtype) for f in far]
            each = [_times(f, _of(back, r)) for r, f in zip(stream.readers, far, strict=True)]
            mixed = _together(each, stream).to(total.dtype)  # [H, M, D]
        else:
            total, mixed = torch.zeros_like(top), top.new_zeros(heads, slots, value.shape[-1])
        total[:, stream.end :] = 1
        for i, block in enumerate(stream.blocks):
            own[i].sub_(_block(top, block, len(key))).exp_()
            _put(total, block, own[i].sum(dim=-1, keepdim=True), add=True)
            own[i] = own[i].to(q.dtype)
            _put(mixed, block, _times(own[i], _block(value, block)), add=True)
        out: Tensor = query.new_empty(slots, heads, value.shape[-1])
        out.copy_(mixed.div_(total).transpose(0, 1))
        kept = [e if block.width <= KEPT else None for e, block in zip(own, stream.blocks, strict=True)]
        if far and front.shape[2] > KEPT:
            far = []
        ctx.save_for_backward(q, key, value, front, back, live, top, total, out, *kept, *far)
        ctx.rest = stream, scaling, window, cap
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, key, value, front, back, live, top, total, out, *kept = ctx.saved_tensors
        stream, scaling, window, cap = ctx.rest
        far, kept = kept[len(stream.blocks) :], kept[: len(stream.blocks)]
        wants, n = ctx.needs_input_grad, len(key)
        masks = _Masks(stream, live, window)
        d = (grads[0] / total.transpose(0, 1)).to(out.dtype).transpose(0, 1)  # [H, M, D]
        delta = (d * out.transpose(0, 1)).sum(dim=-1, keepdim=True)  # [H, M, 1]
        d = d.contiguous()
        found: list[Tensor | None] = [
            torch.empty_like(t) if w else None for t, w in zip((q, key, value), wants, strict=False)
        ]
        for grown in found[1:]:
            if grown is not None:
                grown[:, stream.end :] = 0
        more = [torch.zeros_like(t) if w else None for t, w in zip((front, back), wants[3:5], strict=True)]
        to_q: list[Tensor] = []
        for i, r in enumerate(stream.readers if front is not None and front.shape[2] else ()):
            queries, k, here, down = (_apart(q, r, n), _of(front, r), _apart(d, r, n), _apart(delta, r, n))
            weights = far[i] if far else None
            if weights is None:
                scores = _scores(queries, k, masks.far(r, k.shape[2]), cap)
                weights = scores.sub_(_apart(top, r, n)).exp_().to(q.dtype)
            if r.live is not None:
                here, down = (t * r.live[:, None, None, :, None] for t in (here, down))
            ds = _uncapped(_dots(here, _of(back, r)).sub_(down).mul_(weights), queries, k, cap)
            for whole, left, right in zip(more, (ds, weights), (queries, here), strict=True):
                if whole is not None:
                    _of(whole, r).copy_(left.flatten(2, 3).mT @ right.flatten(2, 3))
            if found[0] is not None:
                to_q.append(_times(ds, k))
        if found[0] is not None:
            found[0].copy_(_together(to_q, stream)) if to_q else found[0].zero_()
        for own, block in zip(kept, stream.blocks, strict=True):
            queries, k, v, here = (
                _block(q, block, n),
                _block(key, block),
                _block(value, block),
                _block(d, block, n),
            )
            if own is None:
                own = (
                    _scores(queries, k, masks.own(block), cap).sub_(_block(top, block, n)).exp_().to(q.dtype)
                )
            ds = _dots(here, v).sub_(_block(delta, block, n)).mul_(own)
            ds = _uncapped(ds, queries, k, cap)
            if found[1] is not None:
                _put(found[1], block, (ds.flatten(2, 3).mT @ queries.flatten(2, 3))[:, :, None])
            if found[2] is not None:
                _put(found[2], block, (own.flatten(2, 3).mT @ here.flatten(2, 3))[:, :, None])
            if found[0] is not None:
                _put(found[0], block, _times(ds, k), add=True)
        if found[0] is not None:
            found[0].mul_(scaling)
        return *found, *more, None, None, None, None, None


class _Masks:
    """What is forbidden, to be broadcast over scores: of a row [R | 1, 1, 1, W, W], of a prefix [K, 1, 1, Q | 1, P]."""

    def __init__(self, stream: Stream, live: Tensor | None, window: int | None) -> None:
        self.stream, self.live, self.window = stream, live, window

    def own(self, block: Block) -> Tensor:
        """Later slots, slots out of the window, other branches."""
        depth = torch.arange(block.width, device=self.stream.depth.device)
        mask = depth[:, None] < depth  # [W, W]
        if self.stream.branch is not None:
            shape = block.rows, 1, 1, block.width
            depth, branch = (t[block.slots].view(shape) for t in (self.stream.depth, self.stream.branch))
            mask = mask | ((branch[..., None, :] != 0) & (branch[..., None, :] != branch[..., None]))
        if self.window is not None:
            mask = mask | (depth[..., None] - depth[..., None, :] >= self.window)
        return mask

    def far(self, readers: Readers, length: int) -> Tensor | None:
        """Dead positions among the last `length`, and those out of the window."""
        mask = None
        if self.live is not None and not readers.even:
            mask = ~self.live[readers.span, None, None, None, -length:]
        widest = max(b.width for b in self.stream.blocks)
        if self.window is not None and widest + length > self.window:
            depth = (
                self.stream.depth[None] if readers.slots is None else self.stream.depth[readers.slots]
            )  # [K', Q]
            gone = (
                depth[..., None] + torch.arange(length, 0, -1, device=depth.device) >= self.window
            )  # [K', Q, P']
            mask = gone[:, None, None] if mask is None else mask | gone[:, None, None]
        return mask


def _block(whole: Tensor, block: Block, heads: int = 0) -> Tensor:
    """[H, M, X] -> [R, N, G, W, X] of a block, where `heads` is N; without it [N, M, X] -> [R, N, W, X]."""
    if not heads:
        rows: Tensor = whole[:, block.slots].unflatten(1, (block.rows, block.width))
        return rows.transpose(0, 1).contiguous()
    part: Tensor = whole.unflatten(0, (heads, -1))[:, :, block.slots].unflatten(2, (block.rows, block.width))
    return part.permute(2, 0, 1, 3, 4).contiguous()


def _put(whole: Tensor, block: Block, part: Tensor, add: bool = False) -> None:
    """Write a block's [R, N, G, W, X] into [H, M, X], or add it."""
    r, n, groups, w, _ = part.shape
    there = whole.unflatten(0, (n, groups))[:, :, block.slots].unflatten(2, (r, w)).permute(2, 0, 1, 3, 4)
    if add:
        there.add_(part)
    else:
        there.copy_(part)


def _of(prefix: Tensor, readers: Readers) -> Tensor:
    """[K, N, P, D] -> a view [K', N, P', D] of the prompts and positions that these read."""
    return prefix[readers.span, :, -readers.length :]


def _apart(whole: Tensor, readers: Readers, heads: int) -> Tensor:
    """[H, M, X] -> [K', N, G, Q, X], the slots that read each prompt; a view for one prompt."""
    if readers.slots is None:
        every: Tensor = whole.unflatten(0, (heads, -1))
        return every[None]
    slots = readers.slots
    parts: Tensor = whole[:, slots.flatten()].unflatten(0, (heads, -1)).unflatten(2, slots.shape)
    return parts.permute(2, 0, 1, 3, 4).contiguous()


def _together(parts: Sequence[Tensor], stream: Stream) -> Tensor:
    """[K', N, G, Q, X] of each readers -> [H, M, X]; a view for one prompt."""
    if stream.read is None:
        return parts[0][0].flatten(0, 1)
    flat = [p.permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1) for p in parts]
    return (flat[0] if len(flat) == 1 else torch.cat(flat, dim=1))[:, stream.read]


def _dots(q: Tensor, k: Tensor) -> Tensor:
    """q [A, N, G, Q, D] k^T [A, N, D, T] -> [A, N, G, Q, T]."""
    found: Tensor = (q.flatten(2, 3) @ k.mT).unflatten(2, q.shape[2:4])
    return found


def _times(weights: Tensor, v: Tensor) -> Tensor:
    """weights [A, N, G, Q, T], v [A, N, T, D] -> [A, N, G, Q, D]."""
    found: Tensor = (weights.flatten(2, 3) @ v).unflatten(2, weights.shape[2:4])
    return found


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, cap: float | None) -> Tensor:
    """Capped and masked products [A, N, G, Q, T], in float32 or wider."""
    scores = _dots(q, k)
    scores = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
    if cap is not None:
        scores = scores.div_(cap).tanh_().mul_(cap)
    return scores if mask is None else scores.masked_fill_(mask, -torch.inf)


def _uncapped(grad: Tensor, q: Tensor, k: Tensor, cap: float | None) -> Tensor:
    """Through s -> cap tanh(s / cap): grad (1 - tanh^2(q k^T / cap))."""
    return grad if cap is None else grad.mul_(1 - (_dots(q, k) / cap).tanh_().square_())
