"""Causal language models: the prompt's keys and values depend on the prompt alone, so they are computed once.

# B batch, K prompts, P length, T text, U target, S joined row, H hidden, V vocabulary, N heads, D head dim
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from incipit.backbones import caches, internals
from incipit.backbones.base import Candidates, by_row, near, token_nll, widened
from incipit.backbones.decoding import GenerateOptions
from incipit.backbones.likelihood import label_nll
from incipit.backbones.packed import Filled, PackedBackbone, behind
from incipit.backbones.rows import compact, last_apart, right_aligned
from incipit.batch import IGNORE, Batch
from incipit.errors import BackboneError
from incipit.injection import Injection, LayerShape


class CausalBackbone(PackedBackbone):
    """A decoder-only model.

    shares: a prefilled prefix equals the plain concatenation here. direct_head: logits can be computed at
    label positions alone. Both are checked at load; where one does not hold, the slow way is taken and a note
    says so.
    """

    family = "causal"

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        if internals.stateful(model):
            raise BackboneError(
                f"{name!r} keeps a recurrent state beside keys and values (linear attention or a state-space "
                "layer): a prompt cannot be shared there yet; choose a model with ordinary attention"
            )
        if internals.per_layer_embeddings(model.config):
            raise BackboneError(
                f"{name!r} looks token ids up in every layer, which the rows of a prompt do not have: "
                "choose a model with one embedding table"
            )
        super().__init__(name, model, tokenizer)
        self.body = self.model.base_model
        self.head = internals.head_of(self.model)
        self.takes_positions = internals.positions_accepted(self.body)
        self.slides = internals.slides(self.config)
        self._check_shortcuts()
        self._find_streams()

    def _positions(self, text: Any) -> int:
        most, steady = super()._positions(text), internals.steady_positions(text)
        if not steady or 0 < most <= steady:
            return most
        self.notes.append(
            f"rows of {self.name!r} are kept within {steady} positions: beyond, it turns every position of a pass by "
            "other frequencies (longrope), and a cached prompt would no longer fit"
        )
        return steady

    # -- forward -------------------------------------------------------------------------------------------

    def _states(self, embeds: Tensor, keys: Injection | None, model: Any) -> Any:
        """Output of `model` (body or whole) on right-padded rows [B, S, H]; `keys` is seen before them.

        Padding stands behind the text, where no text looks, so it is not masked: a masked window would leave it
        nothing to see, and a softmax over nothing is NaN in some attentions.
        """
        arguments: dict[str, object] = {}
        seen = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        if keys is not None:
            assert keys.key_live is not None
            live = keys.key_live[keys.rows].long()  # [B, P]
            arguments["past_key_values"] = caches.prefix_cache(
                keys.keys["decoder"], keys.values["decoder"], keys.rows, self.dtype, grows=False
            )
            arguments |= self._after(live, embeds.shape[1])
            seen = torch.cat([live, seen], dim=1)  # [B, P + S]
        return model(inputs_embeds=embeds, attention_mask=seen, use_cache=False, **arguments)

    def _after(self, live: Tensor, steps: int) -> dict[str, Tensor]:
        """position_ids [B, S] that go on after the live ones of a prefix [B, P]."""
        if not self.takes_positions:
            return {}
        return {"position_ids": live.sum(dim=1, keepdim=True) + torch.arange(steps, device=live.device)}

    def _read_at(self, embeds: Tensor, keys: Injection | None, where: tuple[Tensor, Tensor]) -> Tensor:
        """States [M, H] at the slots `where` (row, step) of right-padded rows [B, S, H]; logits [M, V] without
        `direct_head`."""
        if self.streams:
            return self._streamed(embeds, keys, *where)
        if self.direct_head:
            states: Tensor = self._states(embeds, keys, self.body).last_hidden_state
            return states[where]
        logits: Tensor = self._states(embeds, keys, self.model).logits
        return logits[where]

    def _logits(self, embeds: Tensor, keys: Injection | None, where: tuple[Tensor, Tensor]) -> Tensor:
        """Logits [M, V] there."""
        found = self._read_at(embeds, keys, where)
        return self.head(found) if self.direct_head else found

    def _split(self, batch: Batch, injection: Injection | None) -> tuple[Injection | None, Injection | None]:
        """(keys and values before the rows, inputs that stay with the rows).

        Inputs are prefilled where several rows share a prompt, or where keys stand before them, and none behind the
        text. Where some row has no text of its own, the last prompt row stays with the text: its state predicts that
        row's first label.
        """
        if injection is None or injection.empty or injection.length == 0:
            return None, None
        if injection.inputs is None:
            return self._aligned(injection), None
        shared = self.shares and len(batch) > injection.count and injection.behind is None
        if not injection.keys and not shared:
            return None, injection
        if bool(batch.input_mask.any(dim=1).all()):
            return _some(self.prefill(injection)), None
        before, last = last_apart(injection)
        return (_some(self.prefill(before)) if before is not None else None), last

    def joined(
        self, batch: Batch, injection: Injection | None
    ) -> tuple[Tensor, Tensor, Tensor, Injection | None]:
        """(embeds [B, S, H], mask [B, S], labels [B, S], keys): rows without gaps of inputs, text and target.

        Raises BackboneError for a row without a position that could predict, or one that is too long.
        """
        batch, injection = self.at(batch, injection)
        keys, inputs = self._split(batch, injection)
        prefix, live = self.gather(inputs, batch.rows)
        ids = torch.cat([batch.input_ids, batch.target_ids], dim=1)
        embeds = torch.cat([prefix, self.embed(ids)], dim=1)
        mask = torch.cat([live, batch.input_mask, batch.target_mask], dim=1)
        labels = F.pad(batch.labels, (live.shape[1] + batch.input_ids.shape[1], 0), value=IGNORE)
        ranks = self.ranks(batch, inputs)
        if ranks is not None:
            ranks = F.pad(ranks, (0, batch.target_ids.shape[1]), value=3)
        mask, embeds, labels = compact(mask, embeds, labels, ranks=ranks)
        self._check_rows(mask, labels, keys)
        return embeds, mask, labels, keys

    def _check_rows(self, mask: Tensor, labels: Tensor, keys: Injection | None, new: int = 0) -> None:
        blank = ~mask.any(dim=1)
        if not bool(blank.any()) and labels.shape[1]:
            blank = labels[:, 0] != IGNORE  # nothing stands before that label
        if bool(blank.any()):
            raise BackboneError(
                f"row {int(blank.long().argmax())} has neither text nor input rows before its first label; "
                "keys and values alone predict nothing: give it some text, or put constant text after {soft} "
                "in the layout"
            )
        used = mask.sum(dim=1)
        if keys is not None and keys.key_live is not None:
            used = used + keys.key_live.sum(dim=1)[keys.rows]
        self._check_length(int(used.max()) if used.numel() else 0, new)

    def loss(self, batch: Batch, injection: Injection | None) -> tuple[Tensor, Tensor]:
        embeds, _, labels, keys = self.joined(batch, injection)
        nexts = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # [B, S], the label that position s predicts
        index, step = (nexts != IGNORE).nonzero(as_tuple=True)
        found, labels = self._read_at(embeds, keys, (index, step)), nexts[index, step]
        if self.direct_head:
            return by_row(label_nll(found, labels, self.head), index, embeds.shape[0])
        return token_nll(found, labels, index, embeds.shape[0])

    def next_token(self, batch: Batch, injection: Injection | None) -> Tensor:
        """log p(next token | input) [B, V] after each row's input."""
        with torch.no_grad():
            embeds, mask, _, keys = self.joined(_untargeted(batch), injection)
            index = torch.arange(len(batch), device=mask.device)
            logits = self._logits(embeds, keys, (index, mask.long().sum(dim=1) - 1))
            return widened(logits).log_softmax(dim=-1)

    def choices(self, batch: Batch, injection: Injection | None, ends: Candidates) -> list[list[float]]:
        """log p(candidate | input), one pass over prompt and input for all candidates of a row."""
        batch, injection = self.at(_untargeted(batch), injection)
        if not self.streams or any(not c for row in ends for c in row):
            return super().choices(batch, injection, ends)
        with torch.no_grad():
            embeds, mask, labels, keys = self.joined(batch, injection)
            longest = [max(map(len, row), default=0) for row in ends]
            self._check_rows(mask, labels, keys, max(longest, default=0))
            return self._forked(embeds, mask, keys, ends)

    # -- prefixes ------------------------------------------------------------------------------------------

    def prefill(self, injection: Injection) -> Injection:
        """inputs [K, P, H] (and keys before them) -> keys and values per layer [K, N, P' + P, D];
        differentiable.

        Exact, because in a causal model no prompt position sees the text. Computed once per distinct prompt; one with
        rows behind the text stays as it is.
        """
        if injection.inputs is None or injection.behind is not None:
            return injection
        injection = injection.to(self.device)
        every = torch.arange(injection.count, device=self.device)
        inputs, live = self.gather(injection, every)
        live, inputs = compact(live, inputs)  # [K, P], live rows first, padding last
        earlier = self._aligned(injection).with_rows(every) if injection.keys else None
        if not live.shape[1]:  # no row of any prompt exists
            if earlier is None:
                return replace(injection, inputs=inputs, live=live)
            return replace(earlier, rows=injection.rows, inputs=None, live=None)
        seen, keys, values = (
            self._read(inputs, live, earlier) if self.streams else self._cached(inputs, live, earlier)
        )
        key_live, keys, values = right_aligned(seen, keys, values)
        return replace(
            injection,
            inputs=None,
            live=None,
            keys={"decoder": keys},
            values={"decoder": values},
            key_live=key_live,
        )

    def _cached(self, inputs: Tensor, live: Tensor, earlier: Injection | None) -> Filled:
        """What a model whose rows are padded keeps of right-padded prompts [K, P, H], behind `earlier` keys."""
        cache, seen = caches.fresh_cache(self.layers), live
        attended = torch.ones_like(live)  # the padding too, see _states; `seen` keeps it from the text
        arguments: dict[str, object] = {}
        if earlier is not None:
            assert earlier.key_live is not None
            seen = torch.cat([earlier.key_live, live], dim=1)  # [K, P' + P]
            attended = torch.cat([earlier.key_live, attended], dim=1)
            cache = caches.prefix_cache(
                earlier.keys["decoder"], earlier.values["decoder"], earlier.rows, self.dtype, grows=True
            )
            arguments |= self._after(earlier.key_live, inputs.shape[1])
        self.body(
            inputs_embeds=inputs,
            attention_mask=attended.long(),
            past_key_values=cache,
            use_cache=True,
            **arguments,
        )
        return seen, *caches.cached(cache)

    def _aligned(self, injection: Injection) -> Injection:
        """The prefix with its dead positions in front."""
        assert injection.key_live is not None
        live, keys, values = right_aligned(
            injection.key_live, injection.keys["decoder"], injection.values["decoder"]
        )
        return replace(injection, keys={"decoder": keys}, values={"decoder": values}, key_live=live)

    def activations(
        self, ids: Sequence[int], sites: Sequence[str]
    ) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        cache = caches.fresh_cache(self.layers)
        with torch.no_grad():
            self.body(inputs_embeds=self.embed(ids)[None], past_key_values=cache, use_cache=True)
        keys, values = caches.cached(cache)
        return {"decoder": list(keys)}, {"decoder": list(values)}

    # -- generation ----------------------------------------------------------------------------------------

    def generate(
        self, batch: Batch, injection: Injection | None, options: GenerateOptions
    ) -> list[list[int]]:
        """New token ids per row, up to and without the end token.

        Raises BackboneError where prompt, text and new tokens do not fit the model's positions.
        """
        batch, injection = self.at(_untargeted(batch), injection)
        with torch.no_grad():
            keys, inputs = self._split(batch, injection)
            prefix, live = self.gather(inputs, batch.rows)
            embeds = torch.cat([prefix, self.embed(batch.input_ids)], dim=1)
            mask = torch.cat([live, batch.input_mask], dim=1)
            mask, embeds = compact(mask, embeds, side="left", ranks=self.ranks(batch, inputs))
            self._check_rows(mask, batch.labels, keys, options.max_new_tokens)
            if self.streams and options.beams == 1:
                return self._written(batch, embeds, mask, keys, options)
            lengths = mask.sum(dim=1)
            if keys is None or not self.slides:
                return self._generate(batch, embeds, mask, keys, options)
            answers: list[list[int]] = [[] for _ in range(len(batch))]
            for length in lengths.unique().tolist():  # windows count slots, so no padding behind a prefix
                index = (lengths == length).nonzero()[:, 0]
                rows = embeds[index, -length:], mask[index, -length:]
                part = self._generate(batch.select(index), *rows, keys.with_rows(batch.rows[index]), options)
                for i, ids in zip(index.tolist(), part, strict=True):
                    answers[i] = ids
        return answers

    def _generate(
        self, batch: Batch, embeds: Tensor, mask: Tensor, keys: Injection | None, options: GenerateOptions
    ) -> list[list[int]]:
        """Left-padded rows [B, S, H] after a prefix; 5.23 wants as many embeddings as the mask has slots,
        cuts the cached ones off, and returns new ids only."""
        if self.streams:
            return self._continued(batch, embeds, mask, keys, options)
        if keys is None:
            return self._decoded({"inputs_embeds": embeds, "attention_mask": mask.long()}, options, batch)
        cache = caches.prefix_cache(
            keys.keys["decoder"],
            keys.values["decoder"],
            keys.rows,
            self.dtype,
            grows=True,
            repeats=options.beams,
        )
        assert keys.key_live is not None
        return self._decoded(
            behind(embeds, torch.cat([keys.key_live[keys.rows], mask], dim=1), cache), options, batch
        )

    # -- checks at load ------------------------------------------------------------------------------------

    def _check_shortcuts(self) -> None:
        """Set `direct_head`, `shares` and the decoder site by running six positions each way."""
        ids = (self.frequent_ids(64) or [0])[-6:]
        with torch.no_grad():
            embeds = self.embed((ids * 6)[:6])[None]  # [1, 6, H]
            whole = self._states(embeds, None, self.model).logits
            states = self._states(embeds, None, self.body).last_hidden_state
            self.direct_head = near(whole, self.head(states), 1e-5)
            if not self.direct_head:
                self.notes.append(
                    f"logits of {self.name!r} are computed at every position, not at labels alone: "
                    "its forward does more to them than its output layer"
                )
            why = ""
            try:
                part = Injection(torch.zeros(1, dtype=torch.int64, device=self.device), inputs=embeds[:, :3])
                keys = self.prefill(part)
                rest = self._states(embeds[:, 3:], keys, self.body).last_hidden_state
                if not near(states[:, 3:], rest, 1e-5):
                    why = "its states after a cached prefix differ from those after the same rows as input"
            except internals.FAULTS as error:
                why = f"it does not take a cached prefix ({str(error).splitlines()[0]})"
        self.shares = not why
        if why:
            self.geometry = replace(self.geometry, sites={}, why_no_sites=why)
            self.notes.append(f"the prompt is computed for every row of {self.name!r}, not once: {why}")
            return
        pairs = zip(keys.keys["decoder"], keys.values["decoder"], strict=True)
        shapes = tuple(LayerShape(k.shape[1], k.shape[3], v.shape[3]) for k, v in pairs)
        self.geometry = replace(self.geometry, sites={"decoder": shapes})


def _some(keys: Injection) -> Injection | None:
    """Keys and values that are before the rows; None where no position is."""
    return keys if keys.length else None


def _untargeted(batch: Batch) -> Batch:
    """The batch without its targets."""
    return replace(
        batch,
        target_ids=batch.target_ids[:, :0],
        target_mask=batch.target_mask[:, :0],
        labels=batch.labels[:, :0],
    )
