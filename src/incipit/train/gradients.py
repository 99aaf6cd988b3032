"""sum over a step's rows of grad nll, whatever the split into micro-batches and processes.

# K trainees, B rows of a micro-batch
Nothing is divided here: the sums are exact parts of the whole, and the trainee divides by its own count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from incipit.backbones import autocast
from incipit.batch import Batch, Encoded

Objective: TypeAlias = Callable[
    [Batch], tuple[Tensor, Tensor]
]  # (nll [B] summed over label tokens, count [B])
Collate: TypeAlias = Callable[[Sequence[Encoded], Sequence[int]], Batch]
Row: TypeAlias = tuple[int, Encoded]  # (trainee, its row)


@dataclass(frozen=True)
class Parts:
    """How a step's rows are cut into forward passes; the sums are the same however they are.

    rows: of one pass (0: any number). slots: most tokens of one pass, padding counted (0: any number). more: slots
    that each row has besides its own tokens (a prompt that is computed with it). waste: padded over real size at
    which rows are cut (0: rows are not padded, so that they stand by prompt, then by length).
    """

    rows: int = 0
    slots: int = 0
    more: int = 0
    waste: float = 1.25

    def cut(self, share: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """The passes. One long text in a batch of short ones would pad them all to its length."""
        share = sorted(share, key=self._place)
        start = total = longest = 0
        for end, row in enumerate(share):
            length, size = _length(row) + self.more, end - start
            longest = max(longest, length)
            filled = (size + 1) * longest if self.waste else total + length
            full = (
                size == self.rows
                if self.rows
                else bool(self.waste) and self._wasteful(size, longest, total + length)
            )
            if size and (full or 0 < self.slots < filled):
                yield share[start:end]
                start, total, longest = end, 0, length
            total += length
        if share:
            yield share[start:]

    def _place(self, row: Row) -> tuple[int, ...]:
        size = len(row[1].input_ids), len(row[1].target_ids)
        return size if self.waste else (row[0], *size)

    def _wasteful(self, size: int, longest: int, total: int) -> bool:
        return size >= LEAST and (size + 1) * longest > self.waste * total


LEAST = 16  # rows of a pass before it is cut for its padding


def _length(row: Row) -> int:
    return len(row[1].input_ids) + len(row[1].target_ids)


@dataclass
class Sums:
    """What all processes read in one step."""

    nll: list[float]  # by trainee
    count: list[float]  # label tokens, by trainee
    tokens: int
    asked: bool  # a process was asked to stop
    bad: dict[int, list[str]] = field(
        default_factory=dict
    )  # sources of this process's rows without a finite nll


def accumulate(
    rows: Sequence[Row],
    trainees: int,
    objective: Objective,
    collate: Collate,
    accelerator: Accelerator,
    device: torch.device,
    *,
    parts: Parts,
    precision: str,
    asked: bool,
) -> Sums:
    """Add the gradients of this process's share of the rows; return the sums over all processes."""
    share = list(rows[accelerator.process_index :: accelerator.num_processes])
    totals = torch.zeros(trainees + 1, 2, dtype=torch.float64)  # (nll, count) by trainee; (asked, tokens)
    totals[-1, 0] = float(asked)
    bad: dict[int, list[str]] = {}
    for part in parts.cut(share):
        batch = collate([e for _, e in part], [k for k, _ in part])
        totals[-1, 1] += int(batch.input_mask.sum() + batch.target_mask.sum())
        batch = batch.to(device)
        with autocast(device, precision):
            nll, count = objective(batch)
        if nll.requires_grad or bool(count.any()):  # rows without a label ask for nothing
            nll.sum().backward()
        pairs = torch.stack([nll.detach().cpu().double(), count.cpu().double()], dim=1)  # [B, 2]
        totals.index_add_(0, torch.tensor([k for k, _ in part]), pairs)
        for i in (~pairs[:, 0].isfinite()).nonzero().flatten().tolist():
            bad.setdefault(part[i][0], []).append(part[i][1].source or "of unknown source")
    if accelerator.num_processes > 1:
        totals = accelerator.reduce(totals.to(device), "sum")
    sums: list[list[float]] = totals.tolist()
    *each, (stops, tokens) = sums
    return Sums([nll for nll, _ in each], [count for _, count in each], int(tokens), stops > 0, bad)


def sum_over_processes(params: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """g = sum over processes of g, in one message."""
    if accelerator.num_processes == 1:
        return
    params = list(params)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
    parts = accelerator.reduce(flat, "sum").split([p.numel() for p in params])
    for param, part in zip(params, parts, strict=True):
        param.grad = part.view_as(param).clone()
