"""Batch: the tensors of one step; row i is example i.

# B batch, T input text, U target text
Input and target stay apart; the backbone joins them row by row without gaps, so the padding side is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE = -100  # the target id that carries no loss; the value that torch and Hugging Face use


@dataclass(frozen=True)
class Encoded:
    """One example as token ids.

    input_ids: what the model reads. target_ids: what it must produce.
    trained: which target tokens carry loss (None: all); a chat holds untrained user turns between trained ones.
    choice: class index, for encoders and for classification metrics. source: "file:line" for messages.
    """

    input_ids: tuple[int, ...]
    target_ids: tuple[int, ...] = ()
    trained: tuple[bool, ...] | None = None
    choice: int | None = None
    source: str = ""


@dataclass(frozen=True)
class Batch:
    """input_ids [B, T], input_mask [B, T] bool, target_ids [B, U], target_mask [B, U] bool, labels [B, U], rows [B].

    labels are target_ids with IGNORE where no loss is wanted. choice [B] holds class indices (-1: none).
    """

    input_ids: Tensor
    input_mask: Tensor
    target_ids: Tensor
    target_mask: Tensor
    labels: Tensor
    rows: Tensor
    choice: Tensor
    sources: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        tensors = {n: getattr(self, n).to(device) for n in _TENSORS}
        return replace(self, **tensors)

    def select(self, index: Tensor) -> Batch:
        """Rows `index` [M] of the batch, in that order."""
        tensors = {n: getattr(self, n)[index] for n in _TENSORS}
        sources = tuple(self.sources[i] for i in index.tolist()) if self.sources else ()
        return replace(self, sources=sources, **tensors)


_TENSORS = ("input_ids", "input_mask", "target_ids", "target_mask", "labels", "rows", "choice")


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Pad id lists to (ids [B, T] int64, mask [B, T] bool); T is the longest row."""
    width = max((len(r) for r in rows), default=0)
    ids = torch.full((len(rows), width), value, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        if row:
            where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, where] = torch.tensor(row, dtype=torch.int64)
            mask[i, where] = True
    return ids, mask


def collate(
    encoded: Sequence[Encoded], rows: Sequence[int] | None = None, *, pad_id: int = 0, side: str = "right"
) -> Batch:
    """Make a Batch; row i reads prompt rows[i] (default: prompt 0). `side` places the padding of the input."""
    input_ids, input_mask = pad([e.input_ids for e in encoded], pad_id, side)
    target_ids, target_mask = pad([e.target_ids for e in encoded], pad_id)
    trained, _ = pad(
        [e.trained if e.trained is not None else (True,) * len(e.target_ids) for e in encoded], 0
    )
    return Batch(
        input_ids=input_ids,
        input_mask=input_mask,
        target_ids=target_ids,
        target_mask=target_mask,
        labels=torch.where(target_mask & trained.bool(), target_ids, IGNORE),
        rows=torch.tensor(list(rows) if rows is not None else [0] * len(encoded), dtype=torch.int64),
        choice=torch.tensor([-1 if e.choice is None else e.choice for e in encoded], dtype=torch.int64),
        sources=tuple(e.source for e in encoded),
    )
