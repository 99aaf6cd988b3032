"""Causal models whose rows run as one stream without padding, where a check at load finds that exact.

# B batch, S padded row, M slots of the stream, K prompts, P length, H hidden
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from incipit.backbones import attend, caches, internals, reordered, stream, twoparts, writing
from incipit.backbones.base import Backbone, Candidates, near, widened
from incipit.backbones.decoding import GenerateOptions, row_seeds
from incipit.backbones.ending import Asked
from incipit.backbones.rows import compact
from incipit.backbones.shared import Shared, grouped
from incipit.batch import Batch, Encoded, collate
from incipit.injection import Injection, LayerShape

Filled: TypeAlias = tuple[
    Tensor, tuple[Tensor, ...], tuple[Tensor, ...]
]  # live [K, P], keys, values [K, N, P, D]
Seen: TypeAlias = dict[
    int, tuple[Tensor, Tensor]
]  # id(attention module) -> keys and values [1, N, M, D] of a stream


class PackedBackbone(Backbone):
    """body, head: states of the last layer, and logits from them.

    shares: a prefilled prefix equals the plain concatenation here. direct_head: logits can be computed at label
    positions alone. streams: rows run without padding. All three are checked at load; where one does not hold, the
    slow way is taken and a note says so. attentions: the attention module of each layer, in order; shapes: of its keys
    and values.
    """

    body: Any
    head: internals.Head
    shares: bool
    direct_head: bool
    attentions: list[nn.Module]
    shapes: tuple[LayerShape, ...]
    launch: float  # see stream.launch_cost
    last: nn.Module | None = None  # the last layer, where it can be run for a few slots alone

    def _streamed(self, embeds: Tensor, keys: Injection | None, index: Tensor, step: Tensor) -> Tensor:
        """States [M, H] at slots `step` of right-padded rows `index`; each row is read as far as its last such slot."""
        if not len(index):  # no row has a label
            return embeds.flatten(0, 1)[:0]
        ends = torch.zeros(embeds.shape[0], dtype=torch.int64, device=embeds.device)
        lengths = ends.scatter_reduce(0, index, step + 1, "amax")
        return self._run(embeds, keys, lengths, (index, step))

    def _run(
        self,
        embeds: Tensor,
        keys: Injection | None,
        lengths: Tensor,
        where: tuple[Tensor, Tensor],
        tree: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """States [M, H] at slots `where` (row, step) of right-padded rows [B, S, H], each `lengths` [B] slots long.

        One forward pass without padding, in which each distinct prompt stands once. tree: depth and branch [B, S] of
        each slot, for rows that fork.
        """
        laid, flat, positions, running = self._laid(embeds, keys, lengths, tree)
        asked = Asked(laid.starts[where[0]] + where[1], where[0])
        return attend.streamed(self.body, flat, positions, running, self.last, asked)

    def _computed(
        self, embeds: Tensor, keys: Injection | None, lengths: Tensor
    ) -> tuple[stream.Stream, list[tuple[Tensor, Tensor]]]:
        """Where right-padded rows [B, S, H] lie in a stream, and the keys and values [N, M, D] of each layer there."""
        laid, flat, positions, running = self._laid(embeds, keys, lengths, None)
        seen: Seen = {}
        nothing = Asked(*[torch.zeros(0, dtype=torch.int64, device=embeds.device)] * 2)
        attend.streamed(self.body, flat, positions, replace(running, seen=seen), self.last, nothing)
        return laid, [(k[0], v[0]) for k, v in (seen[id(m)] for m in self.attentions)]

    def _laid(
        self, embeds: Tensor, keys: Injection | None, lengths: Tensor, tree: tuple[Tensor, Tensor] | None
    ) -> tuple[stream.Stream, Tensor, Tensor, attend.Streaming]:
        """Rows as a stream: where they lie, embeddings [M, H] and positions [M] there, what attention is told."""
        rows = keys.rows.tolist() if keys is not None else [0] * len(embeds)
        alive: list[int] = []
        if keys is not None:
            assert keys.key_live is not None
            alive = keys.key_live.sum(dim=1).tolist()
        laid = stream.lay(
            lengths.tolist(),
            rows,
            embeds.shape[1],
            self.launch,
            embeds.device,
            alive=alive,
            group=stream.group_cost(embeds.shape[-1], embeds.device),
            size=reordered.padded if self.ordered else None,
        )
        if tree is not None:
            depth, branch = (t.flatten()[laid.taken] for t in tree)
            laid = replace(laid, depth=depth, branch=branch)
        positions, at = laid.depth, {}
        if keys is not None:
            assert keys.key_live is not None
            positions = positions + keys.key_live.sum(dim=1)[laid.prompt]
            live = None if all(n == keys.length for n in alive) else keys.key_live[list(laid.order)]
            at = {
                i: twoparts.Prefix(key, value, live)
                for i, (key, value) in self._chosen(keys, laid.order).items()
            }
        flat = embeds.flatten(0, 1)[laid.taken]  # [M, H]
        return laid, flat, positions, attend.Streaming(laid, at, last=id(self.attentions[-1]))

    def _read(self, inputs: Tensor, live: Tensor, earlier: Injection | None) -> Filled:
        """live [K, P' + P], keys and values per layer [K, N, P' + P, D] of right-padded prompts [K, P, H].

        What is read stands right-aligned, the dead in front.
        """
        lengths, shape = live.sum(dim=1, keepdim=True), live.shape  # [K, 1]
        laid, found = self._computed(inputs, earlier, lengths[:, 0])
        within = torch.arange(shape[1], device=inputs.device) - (shape[1] - lengths)  # [K, P]
        live = within >= 0
        slots = (laid.starts[:, None] + within.clamp(min=0)).clamp(min=0).flatten()  # the dead repeat others
        keys, values = (
            tuple(layer[i][:, slots].unflatten(1, shape).transpose(0, 1) for layer in found) for i in (0, 1)
        )
        if earlier is None:
            return live, keys, values
        assert earlier.key_live is not None
        before, after = earlier.keys["decoder"], earlier.values["decoder"]
        return (
            torch.cat([earlier.key_live, live], dim=1),
            tuple(torch.cat([a.to(b.dtype), b], dim=2) for a, b in zip(before, keys, strict=True)),
            tuple(torch.cat([a.to(b.dtype), b], dim=2) for a, b in zip(after, values, strict=True)),
        )

    def _forked(
        self, trunk: Tensor, mask: Tensor, keys: Injection | None, ends: Candidates
    ) -> list[list[float]]:
        """log p of what may follow right-padded rows [B, S, H]: prompt and text are read once for all candidates.

        A row is its text and, behind it, every candidate without its last token, each seeing the text and itself.
        """
        sizes: list[int] = mask.sum(dim=1).tolist()
        index, step = list[int](), list[int]()  # predicting slots
        asked: list[tuple[int, int, int, int]] = []  # (row, candidate, predicting slot, token)
        tail: list[tuple[int, ...]] = []  # (row, slot, depth, branch, token)
        for row, candidates in enumerate(ends):
            size = at = sizes[row]
            first = len(index)
            index.append(row)
            step.append(size - 1)
            for number, ids in enumerate(candidates):
                asked.append((row, number, first, ids[0]))
                for inner, token in enumerate(ids[1:]):
                    tail.append((row, at, size + inner, number + 1, ids[inner]))
                    asked.append((row, number, len(index), token))
                    index.append(row)
                    step.append(at)
                    at += 1
            sizes[row] = at
        width = max(sizes, default=0)
        embeds = F.pad(trunk, (0, 0, 0, max(0, width - trunk.shape[1])))
        depth = torch.arange(embeds.shape[1]).repeat(len(trunk), 1)
        branch = torch.zeros_like(depth)
        if tail:
            rows, slots, deep, numbers, tokens = torch.tensor(tail).T
            depth[rows, slots], branch[rows, slots] = deep, numbers
            embeds[rows.to(mask.device), slots.to(mask.device)] = self.embed(tokens)
        where = torch.tensor(index, device=mask.device), torch.tensor(step, device=mask.device)
        tree = depth.to(mask.device), branch.to(mask.device)
        return self._summed(self._run(embeds, keys, torch.tensor(sizes), where, tree), asked, ends)

    def _summed(
        self, states: Tensor, asked: Sequence[tuple[int, int, int, int]], ends: Candidates
    ) -> list[list[float]]:
        """Sums of log p(token | state) over the tokens that each candidate asks for; states [M, H]."""
        slot, token = (
            torch.tensor([a[i] for a in asked], dtype=torch.int64, device=states.device) for i in (2, 3)
        )
        found = torch.empty(len(asked), dtype=torch.float64)
        step = max(1, 2**26 // self.geometry.vocab)  # rows of logits that are held at once
        for start in range(0, len(states), step):
            logs = widened(self.head(states[start : start + step])).log_softmax(dim=-1)
            here = ((slot >= start) & (slot < start + step)).nonzero()[:, 0]
            found[here.cpu()] = logs[slot[here] - start, token[here]].cpu().double()
        sums = [[0.0] * len(row) for row in ends]
        for (row, number, _, _), log in zip(asked, found.tolist(), strict=True):
            sums[row][number] += log
        return sums

    def _chosen(self, keys: Injection, prompts: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """id(attention module) -> keys and values [K, N, P, D] of these prompts, in the model's dtype."""
        whole = list(prompts) == list(range(keys.count))
        pairs = zip(self.attentions, keys.keys["decoder"], keys.values["decoder"], strict=True)

        def chosen(tensor: Tensor) -> Tensor:
            return tensor.to(self.dtype) if whole else tensor.to(self.dtype)[list(prompts)]

        return {id(module): (chosen(key), chosen(value)) for module, key, value in pairs}

    def _continued(
        self, batch: Batch, embeds: Tensor, mask: Tensor, keys: Injection | None, options: GenerateOptions
    ) -> list[list[int]]:
        """New ids of left-padded rows [B, S, H] by beams: prefixes stand once, text is a stream, caches do not grow.

        All but the last slot of each row is read in one stream; `generate` goes on from there.
        """
        order, prompts, groups = grouped(
            keys.rows.tolist() if keys is not None else [0] * len(batch), options.beams
        )
        rows = torch.tensor(order, device=embeds.device)
        embeds, mask = embeds[rows], mask[rows]
        before, shared, live = 0, {}, mask[:, :0]
        if keys is not None:
            keys, before = keys.with_rows(keys.rows[rows]), keys.length
            assert keys.key_live is not None
            live = keys.key_live[keys.rows]
            all_seen = bool(live.all()) and not internals.slides(self.config)
            shared = {i: Shared(k, v, groups, all_seen) for i, (k, v) in self._chosen(keys, prompts).items()}
        cache = caches.own_cache(self.layers, before, embeds.shape[1] + options.max_new_tokens)
        self._fill(cache, embeds, mask, keys, options.beams)
        given = behind(embeds, torch.cat([live, mask], dim=1), cache)
        with attend.injected(attend.Entering(shared=shared)):
            found = self._decoded(given, options, batch.select(rows))
        return [found[order.index(row)] for row in range(len(batch))]

    def _written(
        self, batch: Batch, embeds: Tensor, mask: Tensor, keys: Injection | None, options: GenerateOptions
    ) -> list[list[int]]:
        """New ids of padded rows [B, S, H] without beams; all but the last slot of each row is read in one stream."""
        reads = keys.rows.tolist() if keys is not None else [0] * len(batch)
        order = sorted(range(len(batch)), key=reads.__getitem__)  # rows of one prompt side by side
        index = torch.tensor(order, device=embeds.device)
        mask, embeds = compact(mask[index], embeds[index])
        keys = keys.with_rows(keys.rows[index]) if keys is not None else None
        lengths = mask.sum(dim=1) - 1
        room = mask.shape[1] - 1 + options.max_new_tokens
        rows = writing.opened(self.attentions, self.shapes, keys, lengths, room, embeds)
        if int(lengths.max()) > 0:
            rows.fill(lengths, *self._computed(embeds, keys, lengths))
        first = embeds[torch.arange(len(order), device=embeds.device), lengths]  # [B, H]
        seeds = row_seeds(batch.input_ids, batch.input_mask, options.seed) if options.sample else []
        drawn = [seeds[row] for row in order] if seeds else []
        ids = writing.written(rows, first, options, drawn, self.eos_ids, self.body, self.head, self.embed)
        return [ids[order.index(row)] for row in range(len(order))]

    def _fill(self, cache: Any, embeds: Tensor, mask: Tensor, keys: Injection | None, repeats: int) -> None:
        """Read all but the last slot of left-padded rows, and put their keys and values where generation finds them."""
        width = mask.shape[1]
        lengths = mask.sum(dim=1) - 1
        if int(lengths.max()) < 1:
            return
        laid, found = self._computed(compact(mask, embeds)[1], keys, lengths)
        row, step = mask[:, :-1].nonzero(
            as_tuple=True
        )  # left-padded: slot s of a row is its s - (width - 1 - n)-th
        slots = laid.starts[row] + step - (width - 1 - lengths[row])
        for layer, (key, value) in zip(cache.layers, found, strict=True):
            layer.fill(row, step, key[:, slots], value[:, slots], (len(mask), width - 1), repeats)

    @property
    def layers(self) -> int:
        """Number of layers that keep keys and values."""
        return int(self.config.get_text_config().num_hidden_layers)

    @abstractmethod
    def _states(self, embeds: Tensor, keys: Injection | None, model: Any) -> Any:
        """Output of `model` on right-padded rows [B, S, H]; `keys` is seen before them."""

    def _find_streams(self) -> None:
        """Set `streams`, or say in `notes` why rows are padded here."""
        ids = (self.frequent_ids(64) or [0])[-6:]
        weights = sum(p.numel() for p in self.body.parameters()) - int(self.table.weight.numel())
        self.launch = stream.launch_cost(weights, self.layers, self.device)
        with torch.no_grad():
            embeds = self.embed((ids * 12)[:12]).view(2, 6, -1)  # [2, 6, H]
            stock = self._states(embeds, None, self.body).last_hidden_state
            name = attend.use_interface(self.model)
            try:
                why = self._why_padded(embeds, stock)
            except internals.FAULTS as error:
                why = f"its attention cannot be called so ({str(error).splitlines()[0]})"
        self.streams = not why
        if why:
            attend.use_interface(self.model, name)
            self.notes.append(f"rows of {self.name!r} are padded to the longest of a pass, not packed: {why}")

    def recompute(self) -> None:
        """Gradient checkpointing, where a check finds the same loss and gradient with it."""
        if not self.streams:
            super().recompute()
        ids = torch.tensor([(self.frequent_ids(64) or [0])[:1] * 4] * 2)
        batch = collate([Encoded(tuple(row), tuple(row[:1])) for row in ids.tolist()], pad_id=self.pad_id)
        inputs = self.embed(ids[:1]).clone().requires_grad_()  # [1, 4, H]

        def found() -> tuple[Tensor, Tensor]:
            loss = self.loss(batch, Injection(batch.rows, inputs=inputs))[0].sum()
            return loss.detach(), torch.autograd.grad(loss, inputs)[0]

        plain = found()
        try:
            internals.recompute(self.model, True)
            if all(near(a, b, 1e-5) for a, b in zip(plain, found(), strict=True)):
                return
        except (ValueError, AttributeError, RuntimeError) as error:
            self.notes.append(f"layers of {self.name!r} are not computed again: {str(error).splitlines()[0]}")
        internals.recompute(self.model, False)
        super().recompute()

    def _why_padded(self, embeds: Tensor, stock: Tensor) -> str:
        """What keeps streams from being exact here; "" where nothing does. embeds, stock [2, 6, H]."""
        if not self.direct_head:
            return "its logits cannot be computed from hidden states alone"
        self.attentions, self.shapes, windows = attend.attentions(
            lambda: self._states(embeds, None, self.body)
        )
        if len(self.attentions) != self.layers:
            return "its attention does not go through the attention interface of transformers"
        if internals.slides(self.config) and not windows:
            return "its layers do not say how far they look back"
        if not near(stock, self._states(embeds, None, self.body).last_hidden_state, 1e-5):
            return "the attention interface gives other numbers than its own attention"
        if not self._as_padded(embeds):
            return "a stream gives other numbers than padded rows"
        self.last = internals.last_layer(self.body, self.attentions[-1])
        if self.last is not None:
            hook = attend.narrow(self.last)
            try:
                if self._as_padded(embeds):
                    return ""
            except (TypeError, ValueError, IndexError, RuntimeError):
                pass
            hook.remove()
        self.last = None
        self.notes.append(f"the last layer of {self.name!r} is computed at every slot, asked for or not")
        return ""

    def _as_padded(self, embeds: Tensor) -> bool:
        """Whether a stream gives the states of padded rows [2, 6, H], without a prompt and behind two."""
        short = self.dtype in (torch.bfloat16, torch.float16)
        index = torch.tensor([0, 1, 1, 0], device=self.device)
        step = torch.tensor([5, 0, 3, 2], device=self.device)
        for keys in (None, self._two_prefixes(embeds)) if self.shares else (None,):
            padded = self._states(embeds, keys, self.body).last_hidden_state[index, step]
            # in 16 bits another order of the same sums rounds differently, by several units of the last place
            if not near(padded, self._streamed(embeds, keys, index, step), 1e-4 if short else 1e-5):
                return False
        return True

    def _two_prefixes(self, embeds: Tensor) -> Injection:
        """Two prompts of different lengths, prefilled."""
        live = torch.tensor([[True] * 3, [False, True, True]], device=self.device)
        rows = torch.arange(2, device=self.device)
        return self.prefill(Injection(rows, inputs=embeds[:, :3], live=live))

    @abstractmethod
    def prefill(self, injection: Injection) -> Injection:
        """inputs -> keys and values per layer; differentiable."""


def behind(embeds: Tensor, mask: Tensor, cache: object) -> dict[str, object]:
    """Arguments of `generate` for rows [B, S, H] behind a prefix that the cache counts; mask [B, P + S]."""
    blank = embeds.new_zeros(1, 1, 1).expand(len(embeds), mask.shape[1] - embeds.shape[1], embeds.shape[2])
    return {
        "inputs_embeds": torch.cat([blank, embeds], dim=1),
        "attention_mask": mask.long(),
        "past_key_values": cache,
    }
