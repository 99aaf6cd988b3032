"""A mask over trained rows: pruned tokens and pieces are zero, or tokens are gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from incipit.errors import PromptError
from incipit.injection import Injection
from incipit.prompts.base import Prompt, RowPrompt, check_rows, prefixed
from incipit.prompts.framed import Framed, Reading
from incipit.prompts.isolated import Visibility


class Masked(RowPrompt):
    """P'[i, j] = mask[i, j] P[i, j]: row i of P [P, W] cut into k equal pieces j, each kept or zero.

    Ma et al. 2022 (XPrompt), section 3: token mask and piece mask in one, [P, k]; a token without a piece is pruned.
    Zeroing is the paper's: the row stays as a position of zeros. `removed`: a pruned token is no position at all, so
    the prompt is shorter and cheaper, and another function. Pruned numbers get no gradient and stay exactly zero.
    Raises PromptError for a mask that does not fit.
    """

    kind = "masked"

    def __init__(self, inner: RowPrompt, mask: Tensor, removed: bool = False) -> None:
        super().__init__()
        check_mask(inner, mask)
        self.inner, self.removed = inner, removed
        device = inner.rows().device
        self.register_buffer("mask", mask.detach().to(device, torch.bool).clone(), persistent=False)  # [P, k]
        self.mask: Tensor
        placed = self.mask.any(dim=1) if removed else torch.ones_like(self.mask[:, 0])
        self.register_buffer(
            "placed", placed.nonzero()[:, 0], persistent=False
        )  # rows that are positions [P']
        self.placed: Tensor
        self.length = len(self.placed)
        inner.set_rows(inner.rows().detach() * self.spread())

    @property
    def pieces(self) -> int:
        """k."""
        return int(self.mask.shape[1])

    @property
    def tokens(self) -> int:
        """Rows of which a piece is kept."""
        return int(self.mask.any(dim=1).sum())

    @property
    def kept(self) -> int:
        """Numbers that are not pruned."""
        return int(self.mask.sum()) * (self.width // self.pieces)

    def spread(self) -> Tensor:
        """The mask of every number, [P, W] bool."""
        return self.mask.repeat_interleave(self.width // self.pieces, dim=1)

    def rows(self) -> Tensor:
        return (self.inner.rows() * self.spread())[self.placed]  # [P', W]

    def place(self, rows: Tensor) -> Injection:
        return self.inner.place(rows * self.spread()[self.placed])

    def set_rows(self, rows: Tensor) -> None:
        given = check_rows(rows, self.length, self.width, "the rows").to(self.mask.device)
        whole = given.new_zeros(self.inner.length, self.width).index_copy(0, self.placed, given)
        self.inner.set_rows(whole * self.spread())

    @property
    def width(self) -> int:
        return self.inner.width

    @property
    def scale(self) -> float:
        return self.inner.scale

    def units(self) -> dict[str, float]:
        return prefixed("inner", self.inner.units())

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "removed": self.removed,
            "mask": ["".join("1" if kept else "0" for kept in row) for row in self.mask.tolist()],
            "inner": self.inner.spec(),
        }


def held_at_zero(prompt: Prompt) -> int:
    """How many numbers of a prompt a mask holds at zero: they stand in its file, but are no choice of anybody's."""
    inner: Prompt | None = prompt
    while isinstance(inner, Framed | Visibility | Reading):
        inner = inner.inner
    return inner.mask.shape[0] * inner.width - inner.kept if isinstance(inner, Masked) else 0


def check_mask(inner: Prompt, mask: Tensor) -> None:
    """PromptError for a mask that does not fit the rows, or that leaves nothing."""
    if not isinstance(inner, RowPrompt) or isinstance(inner, Masked):
        raise PromptError(
            f"a mask lies over trained rows, this is a {inner.kind!r} prompt: bake a reparametrised one first, "
            "and prune the prompt that a masked one came from"
        )
    if mask.dim() != 2 or mask.shape[0] != inner.length or not mask.shape[1]:
        raise PromptError(
            f"the mask has shape {tuple(mask.shape)}, a prompt of {inner.length} rows needs ({inner.length}, k)"
        )
    check_pieces(inner, int(mask.shape[1]))
    if not bool(mask.any()):
        raise PromptError("the mask keeps nothing: keep at least one piece of one token")


def check_pieces(inner: RowPrompt, pieces: int) -> None:
    """PromptError where a row cannot be cut into that many equal pieces."""
    if pieces > 1 and inner.kind != "input":
        raise PromptError(
            f"a row of a {inner.kind!r} prompt is its keys and values of all layers, so it has no pieces: prune its "
            "tokens alone (prune.pieces = 1)"
        )
    if pieces < 1 or inner.width % pieces:
        raise PromptError(
            f"{pieces} pieces do not divide a row of {inner.width} numbers: choose a divisor of {inner.width}"
        )


def mask_of(rows: Sequence[str]) -> Tensor:
    """["1101", "0000"] -> [P, k] bool; PromptError for anything but rows of 0 and 1 of one length."""
    if not rows or len({len(row) for row in rows}) != 1 or set("".join(rows)) - {"0", "1"}:
        raise PromptError("the mask of a masked prompt is no table of 0 and 1: its card was damaged")
    return torch.tensor([[kept == "1" for kept in row] for row in rows])


def rows_within(prompt: Prompt) -> RowPrompt:
    """The table of rows inside constant text, isolation and read-out; PromptError when there is none."""
    inner: Prompt | None = prompt
    while isinstance(inner, Framed | Visibility | Reading):
        inner = inner.inner
    if not isinstance(inner, RowPrompt):
        raise PromptError(
            f"the prompt holds no trained rows ({inner.kind if inner else 'constant text'!r}): "
            "take one of kind input or prefix, baked"
        )
    return inner


def rewrapped(prompt: Prompt, change: Callable[[RowPrompt], RowPrompt]) -> Prompt:
    """The same constant text, isolation and read-out around changed rows; nothing is shared with `prompt`."""
    if isinstance(prompt, Framed | Visibility | Reading) and prompt.inner is not None:
        return prompt.around(rewrapped(prompt.inner, change))
    return change(rows_within(prompt))
