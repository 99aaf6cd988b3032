"""Encoder-decoder models: the prompt stands before the encoder input, as in Lester et al. 2021.

# B batch, P length, T text, U target, S joined row, H hidden, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from incipit.backbones import attend
from incipit.backbones.base import token_nll, widened
from incipit.backbones.decoding import GenerateOptions
from incipit.backbones.rows import compact
from incipit.backbones.sites import SiteBackbone
from incipit.batch import IGNORE, Batch
from incipit.errors import BackboneError
from incipit.injection import Injection


class EncoderDecoderBackbone(SiteBackbone):
    """T5, BART and their kin. Keys and values may enter at the sites encoder, decoder and cross."""

    family = "encoder-decoder"

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__(name, model, tokenizer)
        start = getattr(self.config, "decoder_start_token_id", None)
        self.start_id = int(start if start is not None else self.pad_id)
        self.encoder = self.model.get_encoder()
        self._find_sites(self._probe, self.encoder, cross_length=5)

    def _probe(self) -> Tensor:
        ids = torch.tensor([(self.frequent_ids(8) * 5)[:5]], device=self.device)
        logits: Tensor = self.model(
            inputs_embeds=self.embed(ids), decoder_input_ids=ids[:, :3], use_cache=False
        ).logits
        return logits

    def _positions(self, text: Any) -> int:
        return 0 if hasattr(text, "relative_attention_num_buckets") else super()._positions(text)

    def read(self, batch: Batch, injection: Injection | None) -> tuple[Tensor, Tensor]:
        """Encoder states [B, S, H] and mask [B, S] of [prompt; input], right-padded."""
        prefix, live = self.gather(injection, batch.rows)
        embeds = torch.cat([prefix, self.embed(batch.input_ids)], dim=1)
        mask = torch.cat([live, batch.input_mask], dim=1)
        mask, embeds = compact(mask, embeds)
        blank = ~mask.any(dim=1)
        if bool(blank.any()):
            raise BackboneError(
                f"row {int(blank.long().argmax())} has neither text nor input rows, so nothing is encoded: "
                "give it some text"
            )
        self._check_length(mask.shape[1])
        out = self.encoder(inputs_embeds=embeds, attention_mask=mask.long())
        hidden: Tensor = out.last_hidden_state
        return hidden, mask

    def _decode(self, hidden: Tensor, mask: Tensor, target_ids: Tensor) -> Tensor:
        """Logits [B, U, V] of every target position, each from the targets before it."""
        self._check_length(target_ids.shape[1])
        first = torch.full_like(target_ids[:, :1], self.start_id)
        shifted = torch.cat([first, target_ids[:, :-1]], dim=1)
        out = self.model(
            encoder_outputs=(hidden,), attention_mask=mask.long(), decoder_input_ids=shifted, use_cache=False
        )
        logits: Tensor = out.logits
        return logits

    def loss(self, batch: Batch, injection: Injection | None) -> tuple[Tensor, Tensor]:
        if not batch.target_ids.shape[1]:
            raise BackboneError("no row of the batch has a target: there is nothing to learn or to score")
        batch, injection = self.at(batch, injection)
        with self.entering(injection):
            hidden, mask = self.read(batch, injection)
            logits = self._decode(hidden, mask, batch.target_ids)
        keep = batch.labels != IGNORE
        return token_nll(logits[keep], batch.labels[keep], keep.nonzero()[:, 0], len(batch))

    def next_token(self, batch: Batch, injection: Injection | None) -> Tensor:
        """log p(first target token | input) [B, V]."""
        batch, injection = self.at(batch, injection)
        with torch.no_grad(), self.entering(injection):
            hidden, mask = self.read(batch, injection)
            logits = self._decode(hidden, mask, batch.input_ids.new_zeros(len(batch), 1))
        return widened(logits[:, 0]).log_softmax(dim=-1)

    def generate(
        self, batch: Batch, injection: Injection | None, options: GenerateOptions
    ) -> list[list[int]]:
        """New token ids per row, up to and without the end token."""
        batch, injection = self.at(batch, injection)
        self._check_length(1, options.max_new_tokens)  # the decoder's positions; its first is the start token
        repeated = None
        if injection is not None:
            repeated = injection.with_rows(injection.rows.repeat_interleave(options.beams))
        with torch.no_grad():
            with self.entering(injection):
                hidden, mask = self.read(batch, injection)
            with self.entering(repeated, among=("decoder", "cross")):
                given = {"encoder_outputs": attend.encoder_output(hidden), "attention_mask": mask.long()}
                return self._decoded(given, options, batch, self.start_id)

    def activations(
        self, ids: Sequence[int], sites: Sequence[str]
    ) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        tokens = torch.tensor([list(ids)], device=self.device)
        start = torch.full_like(tokens[:, :1], self.start_id)
        shifted = torch.cat([start, tokens[:, :-1]], dim=1)

        def run() -> object:
            return self.model(inputs_embeds=self.embed(tokens), decoder_input_ids=shifted, use_cache=False)

        return attend.record(run, {s: self.modules[s] for s in sites})
