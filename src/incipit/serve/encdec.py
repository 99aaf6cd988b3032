"""Encoder-decoder backbones: inputs are encoded as they come, the cross-attention's keys and values are built once.

# B rows, S encoder states of a row, P length, N heads, D head dim, H hidden, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from incipit.backbones import EncoderDecoderBackbone, alone, internals, slots
from incipit.backbones.memory import Shelf, Slots
from incipit.batch import Encoded, collate
from incipit.errors import IncipitError
from incipit.injection import Injection
from incipit.serve.asks import Ask
from incipit.serve.executor import CacheUse, Row, Scored, Took
from incipit.serve.prefixes import Prefixes
from incipit.serve.rooms import EncoderDecoderRoom
from incipit.serve.sampling import Held, next_tokens
from incipit.serve.scores import alike, scored


class EncoderDecoderExecutor(EncoderDecoderRoom):
    """batched: one decoder pass for all rows, whatever their depth, by T5's relative positions or by a table of
    positions as BART's; otherwise each row by itself, its decoder read anew for every token.
    """

    def __init__(
        self,
        backbone: EncoderDecoderBackbone,
        *,
        rows: int = 34,
        room: int = 0,
        answer: int = 256,
        cache_bytes: int = 0,
        batched: bool = True,
    ) -> None:
        super().__init__(backbone, rows=rows, room=room, answer=answer, batched=batched)
        self.prefixes = Prefixes(backbone, cache_bytes)
        self._free = list(range(rows - 1, -1, -1))
        if batched:
            own, cross = (backbone.geometry.sites[site] for site in ("decoder", "cross"))
            where: Any = backbone.dtype, backbone.device
            self._own = {id(m): i for i, m in enumerate(backbone.modules["decoder"])}
            self._across = {id(m): i for i, m in enumerate(backbone.modules["cross"])}
            holders = internals.bias_holders(backbone.modules["decoder"])
            self._holders = dict(zip(self._own, holders, strict=True)) if holders else {}
            self._shelf = Shelf(own, *where)
            self._slots = Slots(own, rows, answer, *where)
            self._cross = Slots(cross, rows, self.room, *where)

    # -- rows ------------------------------------------------------------------------------------------------------

    def enter(self, row: Row) -> str:
        version, injection = row.ask.version, None
        if version is not None:
            try:
                injection = self.prefixes.take(version)
            except IncipitError as error:
                return str(error)
            if self.batched and "decoder" in injection.keys:
                self._shelf.enter(version.id, lambda: injection)
        row.held = Held(slot=self._free.pop(), prompt=injection)
        return ""

    def leave(self, row: Row) -> None:
        held: Held = row.held
        if row.ask.version is not None:
            if self.batched and "decoder" in held.kept["prompt"].keys:
                self._shelf.leave(row.ask.version.id)
            self.prefixes.give(row.ask.version.id)
        if self.batched and held.kept.get("astray"):
            self._slots.clear(held.slot)
            self._cross.clear(held.slot)
        self._free.append(held.slot)
        self._free.sort(reverse=True)
        row.held = None

    @torch.no_grad()
    def step(self, work: Sequence[tuple[Row, int]]) -> list[Took]:
        logits, _ = self.logits(work)
        took = next_tokens([row for row, _ in work], logits)
        for (row, _), one in zip(work, took, strict=True):
            if one.error:
                row.held.kept["astray"] = True
        return took

    @torch.no_grad()
    def logits(self, work: Sequence[tuple[Row, int]]) -> tuple[Tensor, list[int]]:
        """Logits [B, V] of each row's next token; all rows are read to their end."""
        self._encode([row for row, count in work if count])
        every = list(range(len(work)))
        if not self.batched:
            found = []
            for row, _ in work:
                kept = row.held.kept
                found.append(alone.decoded(self.backbone, kept["states"], kept["entering"], row.new))
            return torch.cat(found), every
        rows = [(r.held.slot, len(r.new), 1, self._name(r)) for r, _ in work]
        known: dict[tuple[int, int], Tensor] = {}

        def bias(module: nn.Module, depth: Tensor, seen: int) -> Tensor:
            holder = self._holders[id(module)]
            if (id(holder), seen) not in known:
                table = internals.bias_before(holder, 1, seen - 1, seen)[0, :, 0].flip(-1)  # [N, distance]
                at = (depth[..., None] - torch.arange(seen, device=depth.device)).clamp(min=0)  # [B, 1, S]
                known[id(holder), seen] = table[:, at].transpose(0, 1)[:, :, None]  # [B, N, 1, 1, S]
            return known[id(holder), seen]

        laid, order, last, _ = slots.lay(
            self._slots, self._shelf, self._own, rows, bias if self._holders else None
        )
        held = [work[i][0].held for i in order]
        across = _Across(
            laid,
            self._cross,
            self._across,
            torch.tensor([h.slot for h in held], device=self.backbone.device),
            torch.tensor([h.kept["length"] for h in held], device=self.backbone.device),
        )
        ids = [work[i][0].new[-1] if work[i][0].new else self.backbone.start_id for i in order]
        depth = torch.tensor([rows[i][1] for i in order]).to(last)
        states = internals.decoder_stream(self.backbone.decoder, torch.tensor([ids]).to(last), depth, across)
        return self.backbone.head(states[last]), every

    def _name(self, row: Row) -> str | None:
        version, prompt = row.ask.version, row.held.kept["prompt"]
        return version.id if version is not None and "decoder" in prompt.keys else None

    # -- the encoder -----------------------------------------------------------------------------------------------

    def _encode(self, rows: Sequence[Row]) -> None:
        """Read new inputs, those whose prompts enter alike together."""
        for some in alike([row.held.kept["prompt"] for row in rows]) if self.batched else []:
            self._read([rows[i] for i in some])
        for row in rows if not self.batched else ():
            self._read([row])

    def _read(self, rows: Sequence[Row]) -> None:
        prompts: list[Injection] = []
        places = []
        for row in rows:
            prompt = row.held.kept["prompt"]
            if prompt is not None and all(prompt is not p for p in prompts):
                prompts.append(prompt)
            places.append(next((i for i, p in enumerate(prompts) if p is prompt), 0))
        batch = collate([Encoded(row.ask.ids) for row in rows], places, pad_id=self.backbone.pad_id)
        given = Injection.stack(prompts, batch.rows) if prompts else None
        batch, given = self.backbone.at(batch, given)
        hidden, mask = self.backbone.read(batch, given)
        lengths = mask.sum(dim=1).tolist()
        if not self.batched:
            for row, states, length in zip(rows, hidden, lengths, strict=True):
                row.held.kept |= {"states": states[None, :length], "entering": given}
            return
        pairs = internals.projected(self.backbone.modules["cross"], hidden)  # per layer [B, N, S, D]
        for i, row in enumerate(rows):
            prompt, slot, before = row.held.kept["prompt"], row.held.slot, 0
            if prompt is not None and "cross" in prompt.keys:
                alive = prompt.key_live[0]
                before = int(alive.sum())
                for whole, parts in ((self._cross.keys, prompt.keys), (self._cross.values, prompt.values)):
                    for layer, part in enumerate(parts["cross"]):
                        whole[layer][slot, :, :before] = part[0, :, alive]
            for whole, states in zip((self._cross.keys, self._cross.values), pairs, strict=True):
                for layer, part in enumerate(states):
                    whole[layer][slot, :, before : before + lengths[i]] = part[i, :, : lengths[i]]
            row.held.kept["length"] = before + lengths[i]

    # -- candidates ------------------------------------------------------------------------------------------------

    def score(self, asks: Sequence[Ask]) -> list[Scored]:
        return scored(self.backbone, self.prefixes, asks, together=self.batched)

    def cache(self) -> CacheUse:
        return self.prefixes.use()


@dataclass(frozen=True)
class _Across:
    """A pass of the decoder whose cross-attention finds its keys and values in slots. rows, lengths [B]."""

    own: slots.Pass
    cross: Slots
    layers: Mapping[int, int]
    rows: Tensor
    lengths: Tensor

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rest: Mapping[str, Any]
    ) -> Tensor:
        """query [1, N, B, D] -> [1, B, N, D]."""
        if id(module) not in self.layers:
            return self.own.attention(module, query, key, value, rest)
        layer, longest = self.layers[id(module)], int(self.lengths.max())
        keys, values = (t[layer][self.rows, :, :longest] for t in (self.cross.keys, self.cross.values))
        seen = torch.arange(longest, device=self.lengths.device) < self.lengths[:, None]
        out = F.scaled_dot_product_attention(
            query[0].transpose(0, 1)[:, :, None],
            keys,
            values,
            attn_mask=seen[:, None, None],
            scale=rest.get("scaling"),
        )
        return out[None, :, :, 0]
