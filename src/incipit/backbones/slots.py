"""Rows that join and leave between steps: keys and values in slots, each prompt's in one place for all its rows.

# B rows of a pass, M new slots of the stream, R prompts at hand, N key/value heads, G query heads of each, Q queries,
# S own positions, P length, D head dim
o = softmax([q Kp^T, q K^T]) [Vp; V] as in shared.py, with memory that outlives a pass: what a row has read stays in its
slot, what its prompt is stands once, and one pass reads any number of new positions of every row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from incipit.backbones.memory import Shelf, Slots


@dataclass(frozen=True)
class Far:
    """How the rows of a part read the shelf. Groups of (places, row of the part at each [places, rows], and for each of
    the group's rows: which row of the part, which cell). live [B, P]. lengths [B]."""

    groups: tuple[tuple[slice | Tensor, Tensor, Tensor, Tensor], ...]
    live: Tensor
    whole: bool  # one group with every row in its own cell, in order
    turn: Tensor | None  # [B], the cell of each row, where one group holds them all


_FREE = (
    4  # rows of one query that take no longer together than one, for what a prompt's numbers take to be read
)


def far_of(shelf: Shelf, names: Sequence[str | None], device: torch.device, single: bool) -> Far | None:
    """The arrangement for rows that read these prompts (None: no prompt); None where nobody reads one.

    single: each row has one query. Then places between that no row of the group reads are read with the others: to
    compute what nobody takes is less than to copy what is taken.
    """
    length = shelf.length
    if not length:
        return None
    rows: dict[int, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None and shelf.lengths[name]:
            rows.setdefault(shelf.place[name], []).append(row)
    if not rows:
        return None
    places = sorted(rows, key=lambda p: (-len(rows[p]), p))
    groups: list[tuple[slice | Tensor, Tensor, Tensor, Tensor]] = []
    while places:  # together those with at least half as many rows as the first, so that little is padded
        deep = len(rows[places[0]])
        some = {p: rows[p] for p in places if 2 * len(rows[p]) >= deep or (single and deep <= _FREE)}
        places = [p for p in places if p not in some]
        low, high = min(some), max(some) + 1
        run = 2 * len(some) >= high - low if single else len(some) == high - low
        taken = range(low, high) if run else sorted(some)
        cells = [[*own, *own[:1] * (deep - len(own))] for own in (some.get(p, [0] * deep) for p in taken)]
        mine = [(row, i * deep + j) for i, p in enumerate(taken) for j, row in enumerate(some.get(p, ()))]
        groups.append(
            (
                slice(low, high) if run else torch.tensor(taken, device=device),
                torch.tensor(cells, device=device),
                torch.tensor([row for row, _ in mine], device=device),
                torch.tensor([cell for _, cell in mine], device=device),
            )
        )
    wide = shelf.live.shape[1]
    blank = torch.zeros(length, dtype=torch.bool, device=device)
    live = torch.stack(
        [shelf.live[shelf.place[n], wide - length :] if n is not None else blank for n in names]
    )
    first = groups[0]
    count = len(names)
    whole = len(groups) == 1 and first[1].flatten().tolist() == list(range(count)) == first[3].tolist()
    turn = first[3][first[2].argsort()] if len(groups) == 1 and len(first[2]) == count else None
    return Far(tuple(groups), live, whole, turn)


@dataclass
class Part:
    """Rows of a pass that have the same number of queries (padded): where they are in stream and slots.

    take [B, Q]: slot of the stream of each query (padding repeats a row's last). back [n]: index into [B * Q] of each
    of this part's slots of the stream; both None where that is the identity and Q = 1. depth [B, Q]: how far a query
    stands in its row. rows: slots of the cache, a slice where most between are its own: those that are not then stand
    in take and depth too, and nobody reads them. seen: own positions that anybody sees. open: without a window every
    row sees all of these and of the prompts.
    """

    first: int
    count: int
    take: Tensor | None
    back: Tensor | None
    depth: Tensor
    rows: slice | Tensor
    seen: int
    far: Far | None
    bias: Callable[[nn.Module, Tensor, int], Tensor] | None = None
    open: bool = False
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """What a query must not see [B, 1, 1, Q, P + S]."""
        if window not in self._masks:
            at = torch.arange(self.seen, device=self.depth.device)
            depth = self.depth[..., None]
            hidden = at > depth  # [B, Q, S]
            if window is not None:
                hidden = hidden | (depth - at >= window)
            if self.far is not None:
                length = self.far.live.shape[1]
                far = ~self.far.live[:, None].expand(-1, self.depth.shape[1], -1)
                if window is not None:
                    before = torch.arange(length, 0, -1, device=at.device)
                    far = far | (depth + before >= window)
                hidden = torch.cat([far, hidden], dim=-1)
            self._masks[window] = hidden[:, None, None]
        return self._masks[window]


@dataclass(frozen=True)
class Pass:
    """A forward pass over new positions of rows in slots: what `attend.attention` hands every layer to.

    own: id(module) -> its layer. write: slot and position of each place of the stream [M]; slots side by side may be a
    slice, and a position that all have a number.
    """

    slots: Slots
    shelf: Shelf
    own: Mapping[int, int]
    parts: tuple[Part, ...]
    write: tuple[Tensor | slice, Tensor | int]

    def further(self) -> Pass:
        """The pass after one in which every row had one new position, for one more of each."""
        parts = tuple(replace(p, depth=p.depth + 1, seen=p.seen + 1, _masks={}) for p in self.parts)
        return replace(self, parts=parts, write=(self.write[0], self.write[1] + 1))

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rest: Mapping[str, Any]
    ) -> Tensor:
        """query [1, N * G, M, D], key and value [1, N, M, D] -> [1, M, N * G, D]."""
        layer = self.own[id(module)]
        keys, values = self.slots.keys[layer], self.slots.values[layer]
        slot, position = self.write
        keys[slot, :, position] = key[0].transpose(0, 1).to(keys.dtype)  # [M, N, D]
        values[slot, :, position] = value[0].transpose(0, 1).to(values.dtype)
        scaling = rest.get("scaling") or query.shape[-1] ** -0.5
        flat = (query[0].transpose(0, 1) * scaling).to(values.dtype)  # [M, N * G, D]
        window, cap = rest.get("sliding_window"), rest.get("softcap")
        done = [self._part(part, module, layer, flat, keys, values, window, cap) for part in self.parts]
        out = done[0] if len(done) == 1 else torch.cat(done)
        return out.to(query.dtype)[None]

    def _part(
        self,
        part: Part,
        module: nn.Module,
        layer: int,
        flat: Tensor,
        keys: Tensor,
        values: Tensor,
        window: int | None,
        cap: float | None,
    ) -> Tensor:
        """[n, N * G, D] of the slots of one part."""
        kv = keys.shape[1]
        q = (
            flat[part.first : part.first + part.count, :, None]
            if part.take is None
            else flat[part.take].transpose(1, 2)
        )
        q = q.unflatten(1, (kv, -1))  # [B, N, G, Q, D]
        k, v = keys[part.rows, :, : part.seen], values[part.rows, :, : part.seen]
        scores = (q.flatten(2, 3) @ k.mT).unflatten(2, q.shape[2:4])  # [B, N, G, Q, S]
        if part.bias is not None:
            scores = scores + part.bias(module, part.depth, part.seen)
        length = 0
        if part.far is not None:
            length = part.far.live.shape[1]
            front = _far(part.far, q, self.shelf.keys[layer][:, :, -length:], None)
            scores = torch.cat([front, scores], dim=-1)
        if scores.dtype in (torch.bfloat16, torch.float16):
            scores = scores.float()
        if cap is not None:
            scores = scores.div_(cap).tanh_().mul_(cap)
        if window is not None or not part.open:
            scores = scores.masked_fill_(part.mask(window), -torch.inf)
        weights = scores.softmax(dim=-1).to(v.dtype)
        out: Tensor = (weights[..., length:].flatten(2, 3) @ v).unflatten(2, q.shape[2:4])  # [B, N, G, Q, D]
        if part.far is not None:
            out = out + _far(part.far, weights[..., :length], None, self.shelf.values[layer][:, :, -length:])
        if part.back is None:
            return out.flatten(1, 3)  # Q = 1
        by_query: Tensor = out.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)  # [B * Q, N * G, D]
        return by_query[part.back]


def _far(far: Far, rows: Tensor, keys: Tensor | None, values: Tensor | None) -> Tensor:
    """rows [B, N, G, Q, X] times each one's prompt: keys [R, N, P, D] transposed, or values as they are."""
    given = keys if keys is not None else values
    assert given is not None
    shape = rows.shape[1:4]
    out: Tensor | None = None
    for places, cells, mine, cell in far.groups:
        there = given[places]
        there = there.mT if keys is not None else there  # [R, N, X, Y]
        prompts, deep = cells.shape
        part = rows if far.whole else rows[cells.flatten()]
        part = part.unflatten(0, (prompts, deep)).transpose(1, 2).flatten(2, 4)  # [R, N, rows * G * Q, X]
        made: Tensor = (part @ there).unflatten(2, (deep, *shape[1:]))  # [R, N, rows, G, Q, Y]
        made = made.transpose(1, 2).flatten(0, 1)  # [cells, N, G, Q, Y]
        if far.whole:
            return made
        if far.turn is not None:
            return made[far.turn]
        if out is None:
            out = rows.new_zeros(rows.shape[0], *shape, there.shape[-1])
        out[mine] = made[cell]
    assert out is not None
    return out


def lay(
    slots: Slots,
    shelf: Shelf,
    own: Mapping[int, int],
    rows: Sequence[tuple[int, int, int, str | None]],
    bias: Callable[[nn.Module, Tensor, int], Tensor] | None = None,
) -> tuple[Pass, list[int], Tensor, Tensor]:
    """(pass, order, last, positions) for rows of (slot, positions read before, new positions, prompt).

    order: the rows as they stand in the stream. last [B]: slot of the stream of each row's last position, in the order
    given. positions [M]: of each slot of the stream, prompts counted.
    """
    device = shelf.device
    single = sorted((i for i, r in enumerate(rows) if r[2] == 1), key=lambda i: rows[i][0])
    longer = [i for i, r in enumerate(rows) if r[2] > 1]
    order = single + longer
    slot = torch.tensor([rows[i][0] for i in order])
    start = torch.tensor([rows[i][1] for i in order])
    count = torch.tensor([rows[i][2] for i in order])
    prompt = torch.tensor([shelf.lengths[n] if (n := rows[i][3]) is not None else 0 for i in order])
    ends = count.cumsum(0)
    within = torch.arange(int(ends[-1])) - (ends - count).repeat_interleave(count)
    depth = start.repeat_interleave(count) + within  # [M]
    parts = []
    for some, low in ((single, 0), (longer, len(single))):
        if not some:
            continue
        span = slice(low, low + len(some))
        wide = int(count[span].max())
        used, names = slot[span], [rows[i][3] for i in some]
        first, each = int((ends - count)[low]), torch.arange(len(some))
        take = back = None
        where: slice | Tensor = used.to(device)
        if some is single:  # sorted by slot
            begin, end = int(used[0]), int(used[-1]) + 1
            if end - begin <= 2 * len(
                some
            ):  # slots between are read with the others: less than to copy these
                where = slice(begin, end)
            if len(some) < end - begin <= 2 * len(some):
                back = (used - begin).to(device)
                each = torch.zeros(end - begin, dtype=torch.int64)
                each[used - begin] = torch.arange(len(some))
                take = each[:, None].to(device)
                filled: list[str | None] = [None] * (end - begin)
                for at, name in zip((used - begin).tolist(), names, strict=True):
                    filled[at] = name
                names = filled
        even = wide == 1 and len(set(start[span].tolist())) == 1
        even = even and all(n is not None and shelf.lengths[n] == shelf.length for n in names if shelf.length)
        inner = torch.minimum(torch.arange(wide), count[span, None][each] - 1)  # [B, Q]
        if wide > 1:
            take = ((ends - count)[span, None] + inner).to(device)
            back = torch.cat([torch.arange(int(n)) + i * wide for i, n in enumerate(count[span])]).to(device)
        parts.append(
            Part(
                first,
                int(count[span].sum()),
                take,
                back,
                (start[span, None][each] + inner).to(device),
                where,
                int((start + count)[span].max()),
                far_of(shelf, names, device, wide == 1),
                bias,
                even,
            )
        )
    last = torch.empty(len(rows), dtype=torch.int64)
    last[torch.tensor(order)] = ends - 1
    write: tuple[Tensor | slice, Tensor | int] = slot.repeat_interleave(count).to(device), depth.to(device)
    if not longer and int(slot[-1] - slot[0]) == len(rows) - 1 and len(set(start.tolist())) == 1:
        write = slice(int(slot[0]), int(slot[-1]) + 1), int(start[0])
    positions = (prompt.repeat_interleave(count) + depth).to(device)
    return Pass(slots, shelf, own, tuple(parts), write), order, last.to(device), positions
