"""Writing: rows go on by one token a step, searched greedily or drawn, each until its end token.

# B rows, S slots of the longest row, K prompts, H hidden, V vocabulary
What `generate` of transformers does for one beam, without what a step here does not need: rows stand in slots behind
prompts that stand once (slots.py), no mask is made of all that was read, and a row that has ended is computed no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from incipit.backbones import attend, slots
from incipit.backbones.decoding import GenerateOptions, RowNoise, warpers
from incipit.backbones.memory import Shelf, Slots
from incipit.backbones.stream import Stream
from incipit.injection import Injection, LayerShape


class Rows:
    """Rows that are being written: row i reads prompts[i] of the shelf and has `lengths[i]` own positions in slot i."""

    def __init__(
        self,
        kept: Slots,
        shelf: Shelf,
        prompts: Sequence[str | None],
        lengths: Sequence[int],
        own: dict[int, int],
    ) -> None:
        self.kept, self.shelf, self.own = kept, shelf, own
        self.rows = [(slot, n, prompts[slot]) for slot, n in enumerate(lengths)]
        self.held = len(self.rows)  # slots that there are
        self._pass: slots.Pass | None = None
        self._positions = torch.empty(0)

    def fill(self, lengths: Tensor, laid: Stream, found: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Hold what each layer found [N, M, D] at the first `lengths` [B] positions of the rows of a stream."""
        steps = torch.arange(int(lengths.max()), device=lengths.device)
        row, step = (steps < lengths[:, None]).nonzero(as_tuple=True)
        at = laid.starts[row] + step
        for layer, parts in enumerate(found):
            for whole, part in zip((self.kept.keys[layer], self.kept.values[layer]), parts, strict=True):
                whole[row, :, step] = part[:, at].transpose(0, 1).to(whole.dtype)

    def next(self) -> tuple[slots.Pass, Tensor]:
        """The pass over the next position of every row, and the model's positions [B]."""
        if self._pass is None:
            asked = [(slot, n, 1, prompt) for slot, n, prompt in self.rows]
            self._pass, _, _, self._positions = slots.lay(self.kept, self.shelf, self.own, asked)
        else:
            self._pass, self._positions = self._pass.further(), self._positions + 1
        self.rows = [(slot, n + 1, prompt) for slot, n, prompt in self.rows]
        return self._pass, self._positions

    def keep(self, which: Sequence[int]) -> None:
        """Go on with these of the rows; the memory of the others is given back when it is half of all."""
        self.rows, self._pass = [self.rows[i] for i in which], None
        if 2 * len(self.rows) <= self.held:
            self.kept.keep(torch.tensor([slot for slot, _, _ in self.rows], device=self.shelf.device))
            self.rows = [(slot, n, prompt) for slot, (_, n, prompt) in enumerate(self.rows)]
            self.held = len(self.rows)


def opened(
    attentions: Sequence[nn.Module],
    shapes: Sequence[LayerShape],
    keys: Injection | None,
    lengths: Tensor,
    room: int,
    like: Tensor,
) -> Rows:
    """Rows with nothing in their slots yet, of `room` positions each, behind right-aligned keys and values."""
    kind, device = like.dtype, like.device
    prompts: list[str | None] = [None] * len(lengths)
    shelf = Shelf((), kind, device)
    if keys is not None:
        shelf, prompts = Shelf.of(keys, shapes, kind), [str(k) for k in keys.rows.tolist()]
    own = {id(module): layer for layer, module in enumerate(attentions)}
    return Rows(Slots(shapes, len(lengths), room, kind, device), shelf, prompts, lengths.tolist(), own)


def written(
    rows: Rows,
    first: Tensor,
    options: GenerateOptions,
    seeds: Sequence[int],
    ends: Sequence[int],
    body: Any,
    head: Callable[[Tensor], Tensor],
    embed: Callable[[Tensor], Tensor],
) -> list[list[int]]:
    """New ids of each row, up to and without one of `ends`; first [B, H]: the last position of its input.

    head: states [B, H] -> logits [B, V]; embed: ids [B] -> [B, H]; seeds: of the draws of each row.
    """
    found: list[list[int]] = [[] for _ in rows.rows]
    alive, now, chain = list(range(len(found))), first, warpers(options)
    noise = RowNoise(seeds, first.device) if options.sample else None
    for step in range(options.max_new_tokens):
        running, positions = rows.next()
        logits = head(attend.streamed(body, now, positions, running))  # [B, V]
        if noise is not None:
            places: Any = positions
            logits = noise(places, chain(places, logits.float()))  # neither reads the ids so far
        chosen = largest(logits)
        ids = chosen.tolist()
        for row, token in zip(alive, ids, strict=True):
            if token not in ends:
                found[row].append(token)
        on = [i for i, token in enumerate(ids) if token not in ends]
        if not on or step == options.max_new_tokens - 1:
            break
        if len(on) < len(alive):
            alive, chosen = [alive[i] for i in on], chosen[torch.tensor(on, device=chosen.device)]
            rows.keep(on)
            if noise is not None:
                noise.keep(on)
        now = embed(chosen)
    return found


def largest(scores: Tensor) -> Tensor:
    """argmax of each row [B, V], the first of equals.

    On a CPU by way of the largest number of each of 16 parts: torch 2.13 finds that some ten times faster than a place.
    """
    if scores.device.type != "cpu" or scores.shape[1] % 16:
        return scores.argmax(dim=-1)
    parts = scores.unflatten(1, (16, -1))
    part = parts.amax(dim=-1).argmax(dim=-1)  # [B]
    inner = parts[torch.arange(len(scores)), part].argmax(dim=-1)
    found: Tensor = part * parts.shape[2] + inner
    return found
