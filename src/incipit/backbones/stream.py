"""Rows of different lengths end to end: the model sees one long row without padding, only attention knows rows.

# K prompts, M slots of the stream, Q slots that read one prompt, B batch, S padded row
Nothing is computed for padding beyond what a Block of nearly equal rows holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    """The slots by the prompt that they read: slots [K, Q], padded where live [K, Q] is False; place [M] in [K * Q]."""

    slots: Tensor
    live: Tensor
    place: Tensor


@dataclass(frozen=True)
class Stream:
    """How rows lie in a stream. Row i of the batch begins at slot starts[i] (-1: it has no slots).

    order: the prompts that are read. taken [M]: row and slot of each place, as an index into padded rows [B * S].
    depth [M]: how far a slot stands in its text. prompt [M]: what each slot reads, as the injection counts; reads [M]:
    the same as `order` counts. readers: None where there is one prompt. branch [M]: 0 for the trunk of a row, else the
    continuation of it that a slot belongs to, which sees trunk and itself but no other (None: rows are trunks).
    """

    blocks: tuple[Block, ...]
    order: tuple[int, ...]
    starts: Tensor
    taken: Tensor
    depth: Tensor
    prompt: Tensor
    reads: Tensor
    readers: Readers | None
    branch: Tensor | None = None


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
    placed = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (lengths[i], rows[i]))
    order = tuple(sorted({rows[i] for i in placed}))
    blocks: list[Block] = []
    widths: list[int] = []
    begin = 0
    for low, high in _cuts([lengths[i] for i in placed], launch):
        block = Block(begin, high - low, lengths[placed[high - 1]])
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
    reads = torch.searchsorted(torch.tensor(order, dtype=torch.int64), prompt)
    readers = _readers(reads, len(order), device) if len(order) > 1 else None
    starts, taken, depth, prompt, reads = (t.to(device) for t in (starts, taken, depth, prompt, reads))
    return Stream(tuple(blocks), order, starts, taken, depth, prompt, reads, readers)


def _cuts(tops: Sequence[int], launch: float) -> Iterator[tuple[int, int]]:
    """Ranges of rising lengths that together cost least: slots of each range at its greatest length, and a launch."""
    ends = [i for i in range(1, len(tops) + 1) if i == len(tops) or tops[i] > tops[i - 1]]
    ends = [e for i, e in enumerate(ends) if i % (1 + len(ends) // 48) == 0 or e == len(tops)]
    best: dict[int, tuple[float, int]] = {0: (0.0, 0)}
    for end in ends:
        best[end] = min(
            (cost + (end - begin) * tops[end - 1] + launch, begin) for begin, (cost, _) in best.items()
        )
    found, end = [], len(tops)
    while end:
        found.append((best[end][1], end))
        end = best[end][1]
    return reversed(found)


def _readers(reads: Tensor, count: int, device: torch.device) -> Readers:
    sizes = reads.bincount(minlength=count)  # [K]
    by_prompt = reads.argsort(stable=True)
    within = torch.empty_like(reads)
    within[by_prompt] = torch.arange(len(reads)) - (sizes.cumsum(0) - sizes)[reads[by_prompt]]
    most = int(sizes.max())
    slots = torch.zeros(count, most, dtype=torch.int64)
    slots[reads, within] = torch.arange(len(reads))
    live = torch.arange(most) < sizes[:, None]
    return Readers(*(t.to(device) for t in (slots, live, reads * most + within)))
