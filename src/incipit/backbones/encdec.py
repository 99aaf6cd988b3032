"""Encoder-decoder models: the prompt stands before the encoder input, as in Lester et al. 2021.

# B batch, K prompts, P length, T text, U target, S joined row, H hidden, V vocabulary, N heads, D head dim
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from incipit.backbones import alike, attend, internals, stream, twoparts, unpadded
from incipit.backbones.base import MAX_ROWS, Candidates, by_row, near, token_nll, widened
from incipit.backbones.decoding import GenerateOptions
from incipit.backbones.likelihood import label_nll
from incipit.backbones.rows import compact, seen
from incipit.backbones.sites import SiteBackbone
from incipit.batch import IGNORE, Batch, pad
from incipit.errors import BackboneError
from incipit.injection import Injection


class EncoderDecoderBackbone(SiteBackbone):
    """T5, BART and their kin. Keys and values may enter at the sites encoder, decoder and cross.

    direct_head: logits can be computed at label positions alone. folds: short targets read the encoder's states
    without projecting them to keys and values. streams: the encoder's rows run without padding.
    geometry.isolates: a prompt that does not see the input can be computed once. All are checked at load; where one
    does not hold, the slow way is taken and a note says so, or the geometry says why.
    """

    family = "encoder-decoder"

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__(name, model, tokenizer)
        start = getattr(self.config, "decoder_start_token_id", None)
        self.start_id = int(start if start is not None else self.pad_id)
        self.encoder, self.decoder = self.model.get_encoder(), self.model.get_decoder()
        self.head = internals.head_of(self.model)
        self._find_sites(self._probe, self.encoder, cross_length=5)
        self.folds = internals.unprojected(self.modules.get("cross", []))
        self._check_head()
        holders = internals.bias_holders(self.modules.get("encoder", []))
        self.holders = (
            {id(m): h for m, h in zip(self.modules["encoder"], holders, strict=True)} if holders else {}
        )
        self.streams = bool(holders)
        weights = sum(p.numel() for p in self.encoder.parameters()) - int(self.table.weight.numel())
        self.launch = stream.launch_cost(weights, len(self.modules.get("encoder", [])), self.device)
        if self.streams:
            alike.share(self.modules["encoder"][0])
        self._check_streams()
        why = self._why_joint()
        self.geometry = replace(self.geometry, isolates=not why, why_joint=why)

    def _probe(self) -> Tensor:
        ids = torch.tensor([(self.frequent_ids(8) * 5)[:5]], device=self.device)
        logits: Tensor = self.model(
            inputs_embeds=self.embed(ids), decoder_input_ids=ids[:, :3], use_cache=False
        ).logits
        return logits

    def _positions(self, text: Any) -> int:
        return 0 if hasattr(text, "relative_attention_num_buckets") else super()._positions(text)

    # -- forward -------------------------------------------------------------------------------------------

    def _ready(self, batch: Batch, injection: Injection | None) -> tuple[Batch, Injection | None]:
        """Both on the device and checked; what is isolated as keys and values."""
        batch, injection = self.at(batch, injection)
        if injection is not None and injection.isolated:
            injection = self.prefill(injection)
        return batch, injection

    def read(self, batch: Batch, injection: Injection | None) -> tuple[Tensor, Tensor]:
        """Encoder states [B, S, H] and mask [B, S] of [prompt; input], right-padded ([input; prompt] where the
        prompt stands behind); of the input alone where the prompt has been prefilled."""
        prefix, live = self.gather(injection, batch.rows)
        embeds = torch.cat([prefix, self.embed(batch.input_ids)], dim=1)
        mask = torch.cat([live, batch.input_mask], dim=1)
        length = prefix.shape[1]
        front = torch.arange(length, device=mask.device) + self.geometry.vocab + length * batch.rows[:, None]
        names = torch.cat([front, batch.input_ids], dim=1)
        mask, embeds, names = compact(mask, embeds, names, ranks=self.ranks(batch, injection))
        blank = ~mask.any(dim=1)
        if injection is not None and injection.isolated:
            assert injection.key_live is not None
            blank = blank & ~injection.key_live.any(dim=1)[injection.rows]
        if bool(blank.any()):
            raise BackboneError(
                f"row {int(blank.long().argmax())} has neither text nor input rows, so nothing is encoded: "
                "give it some text"
            )
        if not mask.shape[1]:  # no row has text: one slot that nothing sees
            mask, names, embeds = F.pad(mask, (0, 1)), F.pad(names, (0, 1)), F.pad(embeds, (0, 0, 0, 1))
        self._check_length(mask.shape[1])
        if injection is not None and injection.within != "all":  # of what was prefilled this is settled
            states: Tensor = self.encoder(
                inputs_embeds=embeds,
                attention_mask=seen(mask, names >= self.geometry.vocab, injection.within),
            ).last_hidden_state
            return states, mask
        return self._states(embeds, mask, injection, names), mask

    def _states(
        self, embeds: Tensor, mask: Tensor, injection: Injection | None, names: Tensor | None = None
    ) -> Tensor:
        """Last encoder states [B, S, H] of right-padded rows; names [B, S] are equal where embeds are."""
        if not self.streams:
            with self.entering(injection, among=("encoder",)):
                out = self.encoder(inputs_embeds=embeds, attention_mask=mask.long())
            hidden: Tensor = out.last_hidden_state
            return hidden
        keyed = injection if injection is not None and "encoder" in injection.keys else None
        rows = keyed.rows.tolist() if keyed is not None else [0] * len(mask)
        laid = stream.lay(mask.sum(dim=1).tolist(), rows, mask.shape[1], self.launch, mask.device)
        if not laid.blocks:  # no row has text
            return embeds
        at = {}
        if keyed is not None:
            assert keyed.key_live is not None
            order = torch.tensor(laid.order, device=mask.device)
            live = None if bool(keyed.key_live.all()) else keyed.key_live[order]
            whole = list(laid.order) == list(range(keyed.count))
            for module, key, value in zip(
                self.modules["encoder"], keyed.keys["encoder"], keyed.values["encoder"], strict=True
            ):
                chosen = (key, value) if whole else (key[order], value[order])
                at[id(module)] = twoparts.Prefix(*chosen, live)
        positioned = keyed is not None and keyed.isolated
        same = alike.found(names.flatten()[laid.taken], unpadded.CHUNK) if names is not None else None
        running = unpadded.Rows(laid, mask.flatten()[laid.taken], at, self.holders, positioned, same)
        return unpadded.encoded(self.encoder, embeds, running)

    def target_logits(self, hidden: Tensor, mask: Tensor, target_ids: Tensor, keep: Tensor) -> Tensor:
        """Logits [M, V] of the target positions `keep` [B, U], each from the targets before it."""
        found = self._target_states(hidden, mask, target_ids, keep)
        return self.head(found) if self.direct_head else found

    def _target_states(self, hidden: Tensor, mask: Tensor, target_ids: Tensor, keep: Tensor) -> Tensor:
        """States [M, H] there; logits [M, V] without `direct_head`."""
        self._check_length(target_ids.shape[1])
        first = torch.full_like(target_ids[:, :1], self.start_id)
        shifted = torch.cat([first, target_ids[:, :-1]], dim=1)
        if not self.direct_head:
            out = self.model(
                encoder_outputs=(hidden,),
                attention_mask=mask.long(),
                decoder_input_ids=shifted,
                use_cache=False,
            )
            logits: Tensor = out.logits
            return logits[keep]
        given: dict[str, object] = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask.long()}
        if self._folding(target_ids.shape[1]):
            with attend.folding(self.modules["cross"]):
                cache = internals.states_as_keys(hidden, len(self.modules["cross"]))
                out = self.decoder(input_ids=shifted, past_key_values=cache, **given)
        else:
            out = self.decoder(input_ids=shifted, use_cache=False, **given)
        states: Tensor = out.last_hidden_state
        return states[keep]

    def _folding(self, length: int) -> bool:
        """Whether targets of `length` tokens are few enough, and no adapter has come into the products since."""
        few = self.folds and length < self.geometry.sites["cross"][0].head_dim
        return few and internals.unprojected(self.modules["cross"])

    def loss(self, batch: Batch, injection: Injection | None) -> tuple[Tensor, Tensor]:
        if not batch.target_ids.shape[1]:
            raise BackboneError("no row of the batch has a target: there is nothing to learn or to score")
        batch, injection = self._ready(batch, injection)
        keep = batch.labels != IGNORE
        hidden, mask = self.read(batch, injection)
        with self.entering(injection, among=("decoder", "cross")):
            found = self._target_states(hidden, mask, batch.target_ids, keep)
        labels, index = batch.labels[keep], keep.nonzero()[:, 0]
        if self.direct_head:
            return by_row(label_nll(found, labels, self.head), index, len(batch))
        return token_nll(found, labels, index, len(batch))

    def next_token(self, batch: Batch, injection: Injection | None) -> Tensor:
        """log p(first target token | input) [B, V]."""
        with torch.no_grad():
            batch, injection = self._ready(batch, injection)
            start = batch.input_ids.new_zeros(len(batch), 1)
            hidden, mask = self.read(batch, injection)
            with self.entering(injection, among=("decoder", "cross")):
                logits = self.target_logits(hidden, mask, start, torch.ones_like(start, dtype=torch.bool))
            return widened(logits).log_softmax(dim=-1)

    def choices(self, batch: Batch, injection: Injection | None, ends: Candidates) -> list[list[float]]:
        """log p(candidate | input): prompt and input are encoded once for all candidates of a row."""
        which = torch.tensor(
            [i for i, row in enumerate(ends) for _ in row], dtype=torch.int64, device=self.device
        )
        ids, live = (t.to(self.device) for t in pad([c for row in ends for c in row], self.pad_id))
        if all(len(c) == 1 for row in ends for c in row):
            logs = self.next_token(batch, injection)  # [B, V]
            first = iter(logs[which, ids.flatten()].tolist())
            return [[next(first) for _ in row] for row in ends]
        found: list[float] = []
        with torch.no_grad():
            batch, injection = self._ready(batch, injection)
            hidden, mask = self.read(batch, injection)
            for some in torch.arange(len(which), device=self.device).split(MAX_ROWS):
                rows, keep = which[some], live[some]
                mine = injection.with_rows(injection.rows[rows]) if injection is not None else None
                with self.entering(mine, among=("decoder", "cross")):
                    logits = self.target_logits(hidden[rows], mask[rows], ids[some], keep)
                nll, _ = token_nll(logits, ids[some][keep], keep.nonzero()[:, 0], len(rows))
                found += (-nll).tolist()
        logs_of = iter(found)
        return [[next(logs_of) for _ in row] for row in ends]

    def generate(
        self, batch: Batch, injection: Injection | None, options: GenerateOptions
    ) -> list[list[int]]:
        """New token ids per row, up to and without the end token."""
        with torch.no_grad():
            batch, injection = self._ready(batch, injection)
            self._check_length(
                1, options.max_new_tokens
            )  # the decoder's positions; its first is the start token
            repeated = None
            if injection is not None:
                repeated = injection.with_rows(injection.rows.repeat_interleave(options.beams))
            hidden, mask = self.read(batch, injection)
            with self.entering(repeated, among=("decoder", "cross")):
                given = {"encoder_outputs": internals.encoder_output(hidden), "attention_mask": mask.long()}
                return self._decoded(given, options, batch, self.start_id)

    # -- isolated prompts ----------------------------------------------------------------------------------

    def prefill(self, injection: Injection) -> Injection:
        """Isolated inputs [K, P, H] -> keys and values [K, N, P, D] at encoder and cross; differentiable.

        Exact, because such a prompt sees itself alone: the encoder reads it once per distinct prompt, and the
        decoder's cross-attention projects its final states. Joint inputs stay as they are.
        """
        if injection.inputs is None or not injection.isolated:
            return injection
        every = torch.arange(injection.count, device=self.device)
        inputs, live = self.gather(injection, every)
        live, inputs = compact(live, inputs, side="left")  # [K, P], live rows last: next to the text
        if not live.shape[1]:
            return replace(injection, inputs=inputs, live=live, isolated=False, within="all")
        found: list[Tensor] = []
        mask = live.long() if injection.within == "all" else seen(live, live, injection.within)

        def run() -> None:
            out = self.encoder(inputs_embeds=inputs, attention_mask=mask)
            found.append(out.last_hidden_state)

        keys, values = attend.record(run, {"encoder": self.modules["encoder"]})
        cross_keys, cross_values = internals.projected(self.modules["cross"], found[0])
        return replace(
            injection,
            inputs=None,
            live=None,
            keys={"encoder": tuple(keys["encoder"]), "cross": cross_keys},
            values={"encoder": tuple(values["encoder"]), "cross": cross_values},
            key_live=live,
            within="all",
        )

    # -- checks at load ------------------------------------------------------------------------------------

    def _check_head(self) -> None:
        """Set `direct_head` by running a few positions each way."""
        ids = torch.tensor([(self.frequent_ids(8) * 5)[:5]], device=self.device)
        mask, keep = torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids[:, :3], dtype=torch.bool)
        with torch.no_grad():
            hidden = self.encoder(inputs_embeds=self.embed(ids), attention_mask=mask.long()).last_hidden_state
            folds, self.folds, self.direct_head = self.folds, False, False
            whole = self.target_logits(hidden, mask, ids[:, :3], keep)
            self.direct_head = True
            self.direct_head = near(whole, self.target_logits(hidden, mask, ids[:, :3], keep), 1e-5)
            if self.direct_head and folds:
                self.folds = True
                try:
                    self.folds = near(whole, self.target_logits(hidden, mask, ids[:, :3], keep), self._loose)
                except internals.FAULTS:
                    self.folds = False
        if not self.direct_head:
            self.notes.append(
                f"logits of {self.name!r} are computed at every position, not at labels alone: "
                "its forward does more to them than its output layer"
            )

    def _check_streams(self) -> None:
        """Keep `streams` where two rows of different lengths have the states that they have when padded."""
        if not self.streams:
            return
        ids = torch.tensor([(self.frequent_ids(6) * 8)[:8]], device=self.device).view(2, 4)  # two come again
        mask = torch.tensor([[True] * 4, [True, True, True, False]], device=self.device)
        with torch.no_grad():
            embeds = self.embed(ids)
            try:
                ours = self._states(embeds, mask, None, ids)[mask]
                self.streams = False
                same = near(self._states(embeds, mask, None)[mask], ours, self._loose)
                why = "" if same else "a stream gives other numbers than padded rows"
            except internals.FAULTS as error:
                why = f"its encoder cannot be called so ({str(error).splitlines()[0]})"
        self.streams = not why
        if why:
            self.notes.append(f"rows of {self.name!r} are padded to the longest of a pass, not packed: {why}")

    @property
    def _loose(self) -> float:
        """How far two orders of the same sums may lie apart (see `near`)."""
        return 1e-4 if self.dtype in (torch.bfloat16, torch.float16) else 1e-5

    def _why_joint(self) -> str:
        """Why no prompt can be isolated here; "" where three rows before three read so give the same states and
        logits as under a mask that forbids the first three to see the others."""
        if not {"encoder", "cross"} <= set(self.modules):
            return self.geometry.why_no_sites or "its attention takes no keys and values"
        if not self.holders:
            return "its encoder has no relative position bias, as T5, mT5 and UMT5 have"
        if not self.streams:
            return "its rows have to be padded (see the notes of the backbone)"
        ids = torch.tensor([(self.frequent_ids(64) * 6)[:6]], device=self.device)
        sees = torch.ones(1, 1, 6, 6, dtype=torch.bool, device=self.device)
        sees[..., :3, 3:] = False
        try:
            with torch.no_grad():
                embeds, target = self.embed(ids), ids[:, :2]
                whole = self.encoder(inputs_embeds=embeds, attention_mask=sees).last_hidden_state
                keep = torch.ones_like(target, dtype=torch.bool)
                joint = self.target_logits(whole, torch.ones_like(ids, dtype=torch.bool), target, keep)
                rows = torch.zeros(1, dtype=torch.int64, device=self.device)
                apart = self.prefill(Injection(rows, inputs=embeds[:, :3], isolated=True))
                mask = torch.ones(1, 3, dtype=torch.bool, device=self.device)
                text = self._states(embeds[:, 3:], mask, apart)
                with self.entering(apart, among=("cross",)):
                    logits = self.target_logits(text, mask, target, keep)
        except internals.FAULTS as error:
            return f"it cannot read a prompt apart ({str(error).splitlines()[0]})"
        same = near(whole[:, 3:], text, self._loose) and near(joint, logits, self._loose)
        return "" if same else "its states after a prompt read apart differ from those under a mask"

    def activations(
        self, ids: Sequence[int], sites: Sequence[str]
    ) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        tokens = torch.tensor([list(ids)], device=self.device)
        start = torch.full_like(tokens[:, :1], self.start_id)
        shifted = torch.cat([start, tokens[:, :-1]], dim=1)

        def run() -> object:
            return self.model(inputs_embeds=self.embed(tokens), decoder_input_ids=shifted, use_cache=False)

        with torch.no_grad():
            return attend.record(run, {s: self.modules[s] for s in sites})
