"""Encoder-decoder models: the prompt stands before the encoder input, as in Lester et al. 2021.

# B batch, P length, T text, U target, S joined row, H hidden, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from incipit.backbones import attend
from incipit.backbones.base import GenerateOptions, token_nll
from incipit.backbones.rows import compact
from incipit.backbones.sites import SiteBackbone
from incipit.batch import IGNORE, Batch
from incipit.errors import BackboneError
from incipit.injection import Injection


class EncoderDecoderBackbone(SiteBackbone):
    """T5, BART and their kin. Keys and values may enter at the sites encoder, decoder and cross."""

    family = "encoder-decoder"

    def __init__(self, name: str, model: nn.Module, tokenizer: object) -> None:
        super().__init__(name, model, tokenizer)
        start = getattr(self.config, "decoder_start_token_id", None)
        self.start_id = int(start if start is not None else self.pad_id)
        self.encoder = self.model.get_encoder()
        self._find_sites(self._probe, self.encoder, cross_length=5)

    def _probe(self) -> object:
        ids = torch.tensor([(self.frequent_ids(8) * 5)[:5]], device=self.device)
        return self.model(inputs_embeds=self.embed(ids), decoder_input_ids=ids[:, :3], use_cache=False)

    def _positions(self, text: Any) -> int:
        return 0 if hasattr(text, "relative_attention_num_buckets") else super()._positions(text)

    def encode(self, batch: Batch, injection: Injection | None) -> tuple[Tensor, Tensor]:
        """Encoder states [B, S, H] and mask [B, S] of [prompt; input], right-padded."""
        prefix, live = self.gather(injection, batch.rows)
        embeds = torch.cat([prefix, self.embed(batch.input_ids)], dim=1)
        mask = torch.cat([live, batch.input_mask], dim=1)
        mask, embeds = compact(mask, embeds)
        if int(mask.sum(dim=1).min()) == 0:
            raise BackboneError("a row without prompt and text cannot be encoded: give it some text")
        out = self.encoder(inputs_embeds=embeds, attention_mask=mask.long())
        hidden: Tensor = out.last_hidden_state
        return hidden, mask

    def _decode(self, hidden: Tensor, mask: Tensor, target_ids: Tensor) -> Tensor:
        """Logits [B, U, V] of every target position, each from the targets before it."""
        first = torch.full_like(target_ids[:, :1], self.start_id)
        shifted = torch.cat([first, target_ids[:, :-1]], dim=1)
        out = self.model(
            encoder_outputs=(hidden,), attention_mask=mask.long(), decoder_input_ids=shifted, use_cache=False
        )
        logits: Tensor = out.logits
        return logits

    def loss(self, batch: Batch, injection: Injection | None) -> tuple[Tensor, Tensor]:
        batch, injection = self.at(batch, injection)
        with self.entering(injection):
            hidden, mask = self.encode(batch, injection)
            logits = self._decode(hidden, mask, batch.target_ids)
        keep = batch.labels != IGNORE
        return token_nll(logits[keep], batch.labels[keep], keep.nonzero()[:, 0], len(batch))

    def next_token(self, batch: Batch, injection: Injection | None) -> Tensor:
        """log p(first target token | input) [B, V]."""
        batch, injection = self.at(batch, injection)
        with torch.no_grad(), self.entering(injection):
            hidden, mask = self.encode(batch, injection)
            logits = self._decode(hidden, mask, batch.input_ids.new_zeros(len(batch), 1))
        return logits[:, 0].float().log_softmax(dim=-1)

    def generate(
        self, batch: Batch, injection: Injection | None, options: GenerateOptions
    ) -> list[list[int]]:
        """New token ids per row, up to and without the end token."""
        batch, injection = self.at(batch, injection)
        repeated = None
        if injection is not None:
            repeated = replace(injection, rows=injection.rows.repeat_interleave(options.beams))
        with torch.no_grad():
            with self.entering(injection):
                hidden, mask = self.encode(batch, injection)
            with self.entering(repeated, among=("decoder", "cross")):
                given = {"encoder_outputs": attend.encoder_output(hidden), "attention_mask": mask.long()}
                return self._decoded(given, options, 1)

    def activations(
        self, ids: Sequence[int], sites: Sequence[str]
    ) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        tokens = torch.tensor([list(ids)], device=self.device)
        start = torch.full_like(tokens[:, :1], self.start_id)
        shifted = torch.cat([start, tokens[:, :-1]], dim=1)

        def run() -> object:
            return self.model(inputs_embeds=self.embed(tokens), decoder_input_ids=shifted, use_cache=False)

        return attend.record(run, {s: self.modules[s] for s in sites})
