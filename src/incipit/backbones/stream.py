"""Rows of different lengths end to end: the model sees one long row without padding, only attention knows rows.

# K prompts, M slots of the stream, Q slots that read one prompt, B batch, S padded row
Nothing is computed for padding beyond what a Block of nearly equal rows holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """`rows` rows of `width` slots from slot `start` on; a row shorter than `width` is padded behind."""

    start: int
    rows: int
    width: int

    @property
    def size(self) -> int:
        """Its slots."""
        return self.rows * self.width

    @property
    def slots(self) -> slice:
        """Where it lies."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class Readers:
    """The slots [K', Q] that read each of `count` prompts, from number `first` of the order on; padding is not live.

    length: so many last positions of these prompts hold all that is alive; even: they hold nothing else. Of a single
    prompt every slot is a reader, and slots is None.
    """

    first: int
    count: int
    length: int
    even: bool
    slots: Tensor | None = None
    live: Tensor | None = None

    @property
    def span(self) -> slice:
        """Its prompts."""
        return slice(self.first, self.first + self.count)

    def to(self, device: torch.device) -> Readers:
        """The same there."""
        slots, live = (t if t is None else t.to(device) for t in (self.slots, self.live))
        return replace(self, slots=slots, live=live)


@dataclass(frozen=True)
class Stream:
    """How rows lie in a stream. Row i of the batch begins at slot starts[i] (-1: it has no slots).

    Slots behind the last block belong to no row: they repeat a slot, and nobody reads them. order: the prompts that are
    read, shortest first. taken [M]: row and slot of each place, as an index into padded rows [B * S].
    depth [M]: how far a slot stands in its text. prompt [M]: what each slot reads, as the injection counts; reads [M]:
    the same as `order` counts. readers: the slots by the prompt that they read; read [M]: where each slot stands in
    them, end to end (None: one prompt, which all read). branch [M]: 0 for the trunk of a row, else the continuation of
    it that a slot belongs to, which sees trunk and itself but no other (None: rows are trunks).
    """

    blocks: tuple[Block, ...]
    order: tuple[int, ...]
    starts: Tensor
    taken: Tensor
    depth: Tensor
    prompt: Tensor
    reads: Tensor
    readers: tuple[Readers, ...]
    read: Tensor | None
    branch: Tensor | None = None

    @property
    def end(self) -> int:
        """Where the last block ends."""
        return self.blocks[-1].slots.stop if self.blocks else 0


LAUNCH = {"cpu": 1.6e7}  # weights by whose products one more set of small ones is long: measured on two cores
GUESSED = 1.6e10  # the same for accelerators
PAIR = 7  # the same for attention of one slot to one position, for each number of a state


def launch_cost(weights: int, layers: int, device: torch.device) -> float:
    """What one more block costs every layer, in slots: the time of its small products over a slot's own."""
    return LAUNCH.get(device.type, GUESSED) * layers / max(1, weights)


def group_cost(hidden: int, device: torch.device) -> float:
    """What it costs to read one more group of prompts apart, in pairs of a slot and a position."""
    return LAUNCH.get(device.type, GUESSED) / (PAIR * hidden)


def lay(
    lengths: Sequence[int],
    rows: Sequence[int],
    padded: int,
    launch: float,
    device: torch.device,
    *,
    alive: Sequence[int] = (),
    group: float = 0.0,
    size: Callable[[int], int] | None = None,
) -> Stream:
    """Rows of these lengths, which read these prompts and stand padded in [B, padded], as a stream.

    launch: what a further block costs, in slots. alive: positions of each prompt that are, its last ones; none: not
    known. group: see `group_cost`. size: slots that a stream of so many is to have. Rows of length 0 take no place.
    """
    placed = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (lengths[i], rows[i]))
    order = tuple(sorted({rows[i] for i in placed}, key=lambda k: (alive[k] if alive else 0, k)))
    blocks: list[Block] = []
    widths: list[int] = []
    begin = 0
    tops = [lengths[i] for i in placed]
    rises = [i for i in range(1, len(tops) + 1) if i == len(tops) or tops[i] > tops[i - 1]]
    for low, high in _cuts(rises, lambda low, high: (high - low) * tops[high - 1], launch):
        block = Block(begin, high - low, tops[high - 1])
        blocks.append(block)
        widths += [block.width] * block.rows
        begin += block.size
    which, width = torch.tensor(placed, dtype=torch.int64), torch.tensor(widths, dtype=torch.int64)
    ends = width.cumsum(0)
    starts = torch.full((len(lengths),), -1, dtype=torch.int64)
    starts[which] = ends - width
    depth = torch.arange(begin) - (ends - width).repeat_interleave(width)
    taken = which.repeat_interleave(width) * padded + depth
    prompt = torch.tensor(rows, dtype=torch.int64)[which].repeat_interleave(width)
    if size is not None and begin:
        depth, taken, prompt = (
            torch.cat([t, t[-1:].expand(size(begin) - begin)]) for t in (depth, taken, prompt)
        )
    number = torch.zeros(max(order, default=0) + 1, dtype=torch.int64)
    number[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
    reads = number[prompt]
    readers, read = _readers(reads, [alive[k] for k in order] if alive else [], len(order), group)
    starts, taken, depth, prompt, reads = (t.to(device) for t in (starts, taken, depth, prompt, reads))
    read = read.to(device) if read is not None else None
    there = tuple(r.to(device) for r in readers)
    return Stream(tuple(blocks), order, starts, taken, depth, prompt, reads, there, read)


def _cuts(ends: Sequence[int], cost: Callable[[int, int], float], launch: float) -> Iterator[tuple[int, int]]:
    """Ranges that end at some of `ends`, the last of them included, and together cost least, each a launch besides."""
    ends = [e for i, e in enumerate(ends) if i % (1 + len(ends) // 48) == 0 or e == ends[-1]]
    best: dict[int, tuple[float, int]] = {0: (0.0, 0)}
    for end in ends:
        best[end] = min((spent + cost(begin, end) + launch, begin) for begin, (spent, _) in best.items())
    found, end = [], max(best)
    while end:
        found.append((best[end][1], end))
        end = best[end][1]
    return reversed(found)


def _readers(
    reads: Tensor, alive: Sequence[int], count: int, group: float
) -> tuple[tuple[Readers, ...], Tensor | None]:
    """Prompts of like lengths and numbers of readers together."""
    if count < 2:
        return tuple(Readers(0, 1, *_reach(alive)) for _ in range(count)), None
    sizes: list[int] = reads.bincount(minlength=count).tolist()
    by_prompt = reads.argsort(stable=True)  # [M]
    starts = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
    within = torch.empty_like(reads)
    within[by_prompt] = torch.arange(len(reads)) - starts[reads[by_prompt]]

    def pairs(low: int, high: int) -> float:
        return (high - low) * max(sizes[low:high]) * max(alive[low:high])

    cuts: Iterable[tuple[int, int]] = [(0, count)]
    if alive:
        cuts = _cuts(range(1, count + 1), pairs, group)
    found: list[Readers] = []
    base = torch.zeros(count, dtype=torch.int64)
    begin = 0
    for low, high in cuts:
        wide = max(sizes[low:high])
        step, own = torch.arange(wide), torch.tensor(sizes[low:high])[:, None]
        slots = by_prompt[starts[low:high, None] + step.minimum(own - 1)]  # [K', Q]
        found.append(Readers(low, high - low, *_reach(alive[low:high]), slots, step < own))
        base[low:high] = begin + torch.arange(high - low) * wide
        begin += (high - low) * wide
    return tuple(found), base[reads] + within


def _reach(alive: Sequence[int]) -> tuple[int, bool]:
    """(most positions alive, at least one; whether each has so many); without knowledge of it (0, False): all."""
    most = max(alive, default=0)
    return max(1, most) if alive else 0, 0 < most == min(alive, default=0)
