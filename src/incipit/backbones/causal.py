"""Causal language models: the prompt's keys and values depend on the prompt alone, so they are computed once.

# B batch, K prompts, P length, T text, U target, S joined row, H hidden, V vocabulary, N heads, D head dim
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from incipit.backbones import attend
from incipit.backbones.base import Backbone, GenerateOptions, token_nll
from incipit.backbones.rows import compact
from incipit.batch import IGNORE, Batch
from incipit.errors import BackboneError
from incipit.injection import Injection, LayerShape


class CausalBackbone(Backbone):
    """A decoder-only model. `shares` says whether a prefilled prefix equals the plain concatenation here, and
    `direct_head` whether logits can be computed at label positions alone; both are checked at load."""

    family = "causal"

    def __init__(self, name: str, model: nn.Module, tokenizer: object) -> None:
        if attend.stateful(model):
            raise BackboneError(
                f"{name!r} keeps a recurrent state beside keys and values (linear attention or a state-space layer): "
                "a prompt cannot be shared there yet; choose a model with ordinary attention"
            )
        super().__init__(name, model, tokenizer)
        self.body = self.model.base_model
        self.head = attend.head_of(self.model)
        self.takes_positions = attend.positions_accepted(self.body)
        self.slides = attend.slides(self.config)
        self.direct_head = self._head_agrees()
        self.shares = self._prefix_agrees()

    # -- forward -----------------------------------------------------------------------------------------------

    def _run(self, embeds: Tensor, mask: Tensor, keys: Injection | None = None) -> Tensor:
        """Hidden states [B, S, H] of right-padded rows; `keys` is a prefix seen before them."""
        arguments: dict[str, object] = {}
        if keys is not None:
            assert keys.key_live is not None
            live = keys.key_live[keys.rows]  # [B, P]
            arguments["past_key_values"] = attend.prefix_cache(
                keys.keys["decoder"], keys.values["decoder"], keys.rows, grows=False
            )
            if self.takes_positions:
                steps = torch.arange(embeds.shape[1], device=embeds.device)
                arguments["position_ids"] = live.sum(dim=1, keepdim=True) + steps  # [B, S]
            mask = torch.cat([live, mask], dim=1)  # [B, P + S]
        out = self.body(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False, **arguments)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def joined(
        self, batch: Batch, injection: Injection | None
    ) -> tuple[Tensor, Tensor, Tensor, Injection | None]:
        """(embeds [B, S, H], mask [B, S], labels [B, S], keys): rows without gaps, inputs prefilled where that pays.

        Where a row's first label would follow the prefix directly, the last prefix row stays with the text, so that
        its state predicts that label.
        """
        batch, injection = self.at(batch, injection)
        keys = None
        if injection is not None and injection.keys:
            keys = injection if injection.inputs is None else None
            if injection.inputs is not None and self._bare(batch):
                keys = replace(injection, inputs=None, live=None)
            elif injection.inputs is not None:
                keys, injection = self.prefill(injection), None
        elif (
            injection is not None
            and injection.inputs is not None
            and self.shares
            and len(batch) > injection.count
        ):
            if not self._bare(batch):
                keys, injection = self.prefill(injection), None
        prefix, live = self.gather(injection, batch.rows)
        ids = torch.cat([batch.input_ids, batch.target_ids], dim=1)
        embeds = torch.cat([prefix, self.embed(ids)], dim=1)
        mask = torch.cat([live, batch.input_mask, batch.target_mask], dim=1)
        labels = F.pad(batch.labels, (live.shape[1] + batch.input_ids.shape[1], 0), value=IGNORE)
        mask, embeds, labels = compact(mask, embeds, labels)
        return embeds, mask, labels, keys

    @staticmethod
    def _bare(batch: Batch) -> bool:
        """Whether some row has no input token before its target."""
        return bool((~batch.input_mask.any(dim=1)).any())

    def loss(self, batch: Batch, injection: Injection | None) -> tuple[Tensor, Tensor]:
        embeds, mask, labels, keys = self.joined(batch, injection)
        nexts = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # [B, S], the label that position s predicts
        keep = nexts != IGNORE
        index = keep.nonzero()[:, 0]
        if self.direct_head:
            logits = self._logits(self._run(embeds, mask, keys)[keep])  # [M, V]
        else:
            logits = self._full_logits(embeds, mask, keys)[keep]
        return token_nll(logits, nexts[keep], index, embeds.shape[0])

    def next_token(self, batch: Batch, injection: Injection | None) -> Tensor:
        """log p(next token | input) [B, V] after each row's input."""
        batch = replace(
            batch,
            target_ids=batch.target_ids[:, :0],
            target_mask=batch.target_mask[:, :0],
            labels=batch.labels[:, :0],
        )
        with torch.no_grad():
            embeds, mask, _, keys = self.joined(batch, injection)
            last = mask.long().sum(dim=1) - 1
            rows = torch.arange(len(batch), device=last.device)
            if self.direct_head:
                logits = self._logits(self._run(embeds, mask, keys)[rows, last])  # [B, V]
            else:
                logits = self._full_logits(embeds, mask, keys)[rows, last]
            return logits.float().log_softmax(dim=-1)

    def _full_logits(self, embeds: Tensor, mask: Tensor, keys: Injection | None) -> Tensor:
        body, self.body = self.body, _WithLogits(self.model)
        try:
            return self._run(embeds, mask, keys)
        finally:
            self.body = body

    # -- prefixes ----------------------------------------------------------------------------------------------

    def prefill(self, injection: Injection) -> Injection:
        """inputs [K, P, H] (and keys before them) -> keys and values per layer [K, N, P' + P, D]; differentiable.

        Exact, because in a causal model no prompt position sees the text. Computed once per distinct prompt.
        """
        if injection.inputs is None:
            return injection
        count = injection.count
        every = torch.arange(count, device=self.device)
        each = injection.with_rows(every)
        inputs, live = self.gather(each, every)
        mask, moved = compact(live, inputs)  # live rows first, padding last
        earlier = None
        arguments: dict[str, object] = {}
        if injection.keys:
            assert injection.key_live is not None
            earlier = injection.key_live
            cache = attend.prefix_cache(
                injection.keys["decoder"], injection.values["decoder"], every, grows=True
            )
            if self.takes_positions:
                steps = torch.arange(moved.shape[1], device=self.device)
                arguments["position_ids"] = earlier.sum(dim=1, keepdim=True) + steps
        else:
            cache = attend.fresh_cache(self.layers)
        seen = mask if earlier is None else torch.cat([earlier, mask], dim=1)
        self.body(
            inputs_embeds=moved,
            attention_mask=seen.long(),
            past_key_values=cache,
            use_cache=True,
            **arguments,
        )
        keys, values = attend.cached(cache)
        if not bool(mask.all()):  # right-align: the dead slots go to the front
            order = torch.argsort(seen.to(torch.uint8), dim=1, stable=True)  # [K, P' + P]
            seen = seen.gather(1, order)
            keys, values = (
                tuple(t.gather(2, order[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])) for t in ts)
                for ts in (keys, values)
            )
        return Injection(
            injection.rows, None, {"decoder": keys}, {"decoder": values}, None, seen, injection.readout
        )

    @property
    def layers(self) -> int:
        """Number of layers that keep keys and values."""
        return int(self.config.get_text_config().num_hidden_layers)

    def activations(
        self, ids: Sequence[int], sites: Sequence[str]
    ) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        cache = attend.fresh_cache(self.layers)
        with torch.no_grad():
            self.body(inputs_embeds=self.embed(ids)[None], past_key_values=cache, use_cache=True)
        keys, values = attend.cached(cache)
        return {"decoder": list(keys)}, {"decoder": list(values)}

    # -- generation --------------------------------------------------------------------------------------------

    def generate(
        self, batch: Batch, injection: Injection | None, options: GenerateOptions
    ) -> list[list[int]]:
        """New token ids per row, up to and without the end token."""
        batch, injection = self.at(batch, injection)
        if injection is None or not injection.keys:
            return self._generate(batch, injection, options)
        lengths = batch.input_mask.sum(dim=1)
        if int(lengths.min()) == 0:
            raise BackboneError(
                "a prefix prompt generates after at least one text token: row "
                f"{int(lengths.argmin())} is empty; put constant text after {{soft}} in the layout"
            )
        keys = self.prefill(injection)
        if not self.slides:
            return self._generate(batch, keys, options)
        answers: list[list[int]] = [[] for _ in range(len(batch))]
        for length in lengths.unique().tolist():  # windows count positions, so rows must not contain padding
            index = (lengths == length).nonzero()[:, 0]
            part = self._generate(batch.select(index), keys.with_rows(batch.rows[index]), options)
            for i, ids in zip(index.tolist(), part, strict=True):
                answers[i] = ids
        return answers

    def _generate(
        self, batch: Batch, injection: Injection | None, options: GenerateOptions
    ) -> list[list[int]]:
        if injection is not None and injection.keys:
            mask, ids = compact(batch.input_mask, batch.input_ids, side="left")
            assert injection.key_live is not None
            live = injection.key_live[injection.rows]
            given = {
                "input_ids": ids,
                "attention_mask": torch.cat([live, mask], dim=1).long(),
                "past_key_values": attend.prefix_cache(
                    injection.keys["decoder"],
                    injection.values["decoder"],
                    injection.rows,
                    grows=True,
                    repeats=options.beams,
                ),
            }
            skip = ids.shape[1]
        else:
            prefix, live = self.gather(injection, batch.rows)
            mask, embeds = compact(
                torch.cat([live, batch.input_mask], dim=1),
                torch.cat([prefix, self.embed(batch.input_ids)], dim=1),
                side="left",
            )
            given, skip = {"inputs_embeds": embeds, "attention_mask": mask.long()}, 0
        return self._decoded(given, options, skip)

    # -- checks at load ----------------------------------------------------------------------------------------

    def _head_agrees(self) -> bool:
        """Whether head(hidden) equals the model's own logits."""
        with torch.no_grad():
            embeds = self._sample()
            whole = self.model(inputs_embeds=embeds, use_cache=False).logits
            ours = self._logits(self.body(inputs_embeds=embeds, use_cache=False).last_hidden_state)
        return _near(whole, ours)

    def _prefix_agrees(self) -> bool:
        """Whether three prefilled positions and three more give the states of all six."""
        embeds = self._sample()
        mask = torch.ones(1, 3, dtype=torch.bool, device=self.device)
        try:
            with torch.no_grad():
                whole = self._run(embeds, torch.cat([mask, mask], dim=1))
                part = Injection(torch.zeros(1, dtype=torch.int64, device=self.device), inputs=embeds[:, :3])
                keys = self.prefill(part)
                rest = self._run(embeds[:, 3:], mask, keys)
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
            return False
        layers = keys.keys["decoder"]
        shapes = tuple(
            LayerShape(k.shape[1], k.shape[3], v.shape[3])
            for k, v in zip(layers, keys.values["decoder"], strict=True)
        )
        agrees = _near(whole[:, 3:], rest)
        if agrees:
            self.geometry = replace(self.geometry, sites={"decoder": shapes})
        return agrees

    def _sample(self) -> Tensor:
        ids = (self.frequent_ids(64) or [0])[-6:]
        with torch.no_grad():
            return self.embed((ids * 6)[:6])[None]  # [1, 6, H]


class _WithLogits:
    """The whole model in the place of its body: `last_hidden_state` holds logits."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, **arguments: object) -> object:
        out = self.model(**arguments)
        out.last_hidden_state = out.logits
        return out


def _near(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-4 if a.dtype in (torch.float32, torch.float64) else 5e-2
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= tolerance * max(1.0, float(a.abs().max())))
