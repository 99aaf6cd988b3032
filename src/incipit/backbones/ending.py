"""The last layer at the slots that are asked for: keys and values of every slot, all else at these alone.

# m asked slots, M slots of the stream, R rows with asked slots, U most asked of a row, W slots of a row, K prompts,
# P length, N key/value heads, G query heads of each, D head dim
No slot's last state is read by another slot, so what nobody asks for need not be computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from incipit.backbones.stream import Prefix, Stream


@dataclass(frozen=True)
class Asked:
    """slots [m]: places in the stream whose last states are wanted; rows [m]: the row of the batch that each is of."""

    slots: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return int(self.slots.numel())


@dataclass(frozen=True)
class _Groups:
    """m things in groups: thing i is number place[i] of group[i]; laid out as [count, width]."""

    group: Tensor
    place: Tensor
    count: int
    width: int

    @staticmethod
    def of(ids: Tensor, count: int) -> _Groups:
        """ids [m] in 0..count - 1."""
        order = ids.argsort(stable=True)
        sizes = ids.bincount(minlength=count)
        place = torch.empty_like(ids)
        place[order] = torch.arange(len(ids), device=ids.device) - (sizes.cumsum(0) - sizes)[ids[order]]
        return _Groups(ids, place, count, int(sizes.max()))

    def apart(self, things: Tensor) -> Tensor:
        """things [m, N, G, X] -> [count, N, G * width, X], zero where a group is shorter."""
        _, n, g, size = things.shape
        whole = things.new_zeros(self.count, self.width, n, g, size)
        whole = whole.index_put((self.group, self.place), things)
        return whole.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def together(self, whole: Tensor) -> Tensor:
        """[count, N, G * width, X] -> [m, N, G, X]."""
        parts: Tensor = whole.unflatten(2, (-1, self.width)).permute(0, 3, 1, 2, 4)[self.group, self.place]
        return parts


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix | None,
    stream: Stream,
    asked: Asked,
    scaling: float,
    window: int | None,
    cap: float | None,
) -> Tensor:
    """query [1, N * G, m, D] at the asked slots, key and value [1, N, M, D] of all -> [1, m, N * G, D]."""
    heads = key.shape[1]
    query = query[0].to(value.dtype).unflatten(0, (heads, -1)).permute(2, 0, 1, 3) * scaling  # [m, N, G, D]
    rows, row = asked.rows.unique(return_inverse=True)  # [R], [m]
    starts = stream.starts[rows]
    at = asked.slots - starts[row]  # [m], where in its row
    steps = torch.arange(int(at.max()) + 1, device=at.device)  # [W]
    slots = (starts[:, None] + steps).clamp(
        max=key.shape[2] - 1
    )  # [R, W]; beyond a row's end nothing is seen
    by_row = _Groups.of(row, len(rows))
    k, v = (t[0].to(value.dtype)[:, slots].transpose(0, 1) for t in (key, value))  # [R, N, W, D]
    scores = [by_row.together(by_row.apart(query) @ k.mT)]  # [m, N, G, W]
    masks: list[Tensor | None] = [_unseen(stream, asked, slots[row], at, steps, window)]
    if prefix is not None:
        length = prefix.keys.shape[2]
        place = torch.empty(int(max(stream.order)) + 1, dtype=torch.int64, device=at.device)
        place[list(stream.order)] = torch.arange(len(stream.order), device=at.device)
        prompt = place[stream.prompt[asked.slots]]  # [m]
        by_prompt = _Groups.of(prompt, prefix.keys.shape[0])
        kp, vp = prefix.keys.to(value.dtype), prefix.values.to(value.dtype)
        scores.append(by_prompt.together(by_prompt.apart(query) @ kp.mT))  # [m, N, G, P]
        far = None if prefix.live is None else ~prefix.live[prompt]  # [m, P]
        if window is not None:
            gone = (
                stream.depth[asked.slots][:, None] + torch.arange(length, 0, -1, device=at.device) >= window
            )
            far = gone if far is None else far | gone
        masks.append(far)
    wide = [s.float() if s.dtype in (torch.bfloat16, torch.float16) else s for s in scores]
    if cap is not None:
        wide = [torch.tanh(s / cap) * cap for s in wide]
    wide = [
        s if m is None else s.masked_fill(m[:, None, None], -torch.inf)
        for s, m in zip(wide, masks, strict=True)
    ]
    weights = torch.cat(wide, dim=-1).softmax(dim=-1).to(value.dtype)  # [m, N, G, W + P]
    out = by_row.together(by_row.apart(weights[..., : len(steps)]) @ v)  # [m, N, G, D]
    if prefix is not None:
        out = out + by_prompt.together(by_prompt.apart(weights[..., len(steps) :]) @ vp)
    return out.flatten(1, 2)[None]  # [1, m, N * G, D]


def _unseen(
    stream: Stream, asked: Asked, slots: Tensor, at: Tensor, steps: Tensor, window: int | None
) -> Tensor:
    """[m, W]: what an asked slot does not see of its row, whose places are `slots` [m, W]."""
    unseen = steps > at[:, None]
    if stream.branch is not None:
        branch, own = stream.branch[slots], stream.branch[asked.slots]
        unseen = unseen | ((branch != 0) & (branch != own[:, None]))
    if window is not None:
        unseen = unseen | (stream.depth[asked.slots][:, None] - stream.depth[slots] >= window)
    return unseen
