"""Bidirectional encoders (BERT family): classification by label words, by a masked-LM verbalizer, or by a
head.

# B batch, K prompts, P length, T text, S joined row, H hidden, C classes, V vocabulary
All three are logits = scale * f(pooled) . vectors + bias, with other vectors (see Readout).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from incipit.backbones import attend, internals
from incipit.backbones.base import near, widened
from incipit.backbones.rows import compact
from incipit.backbones.sites import SiteBackbone
from incipit.batch import Batch
from incipit.errors import BackboneError
from incipit.injection import Injection, Readout

READOUTS = ("words", "verbalizer", "head")
WORD_SCALE = 20.0  # cosine to logits; the value with which the sentence encoder was trained


class EncoderBackbone(SiteBackbone):
    """BERT, RoBERTa, DeBERTa-v2, ModernBERT and their kin."""

    family = "encoder"

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__(name, model, tokenizer)
        has_head = self.model.get_output_embeddings() is not None
        self.body = self.model.base_model if has_head else self.model
        self.has_lm_head = has_head and self._head_agrees()
        self._find_sites(self._probe, None)

    def _sample(self) -> dict[str, Tensor]:
        ids = torch.tensor([(self.frequent_ids(8) * 5)[:5]], device=self.device)
        return {"inputs_embeds": self.embed(ids), "attention_mask": torch.ones_like(ids)}

    def _probe(self) -> Tensor:
        states: Tensor = self.body(**self._sample()).last_hidden_state
        return states

    def _head_agrees(self) -> bool:
        """Whether the masked-LM logits are (what stands before the output layer) . W + b."""
        output = self.model.get_output_embeddings()
        try:
            with torch.no_grad():
                whole = self.model(**self._sample()).logits
                ours = output(internals.before_output(self.model, **self._sample()))
            agrees = whole.shape == ours.shape and near(whole, ours, 1e-5)
        except internals.FAULTS:
            agrees = False
        if not agrees:
            self.notes.append(
                f"the masked-LM head of {self.name!r} is of a kind not known here: no verbalizer; "
                'read it out by "words" or "head"'
            )
        return agrees

    def _positions(self, text: Any) -> int:
        offset = 0
        if text.model_type in _OFFSET_POSITIONS:  # its positions are counted from padding_idx + 1 on
            offset = int(text.pad_token_id or 0) + 1
        return super()._positions(text) - offset

    def states(
        self, batch: Batch, injection: Injection | None, transformed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(hidden [B, S, H], mask [B, S], is_text [B, S], ids [B, S]) of [prompt; text], right-padded.

        transformed: hidden states as the masked-LM output layer gets them.
        """
        prefix, live = self.gather(injection, batch.rows)
        embeds = torch.cat([prefix, self.embed(batch.input_ids)], dim=1)
        mask = torch.cat([live, batch.input_mask], dim=1)
        is_text = torch.cat([torch.zeros_like(live), batch.input_mask], dim=1)
        ids = torch.cat([batch.input_ids.new_full(live.shape, -1), batch.input_ids], dim=1)
        ranks = self.ranks(batch, injection)
        mask, embeds, is_text, ids = compact(mask, embeds, is_text, ids, ranks=ranks)
        blank = ~is_text.any(dim=1)
        if bool(blank.any()):
            raise BackboneError(f"row {int(blank.long().argmax())} has no text to classify: give it some")
        self._check_length(mask.shape[1])
        given = {"inputs_embeds": embeds, "attention_mask": mask.long()}
        with self.entering(injection):
            if transformed:
                hidden = internals.before_output(self.model, **given)
            else:
                hidden = self.body(**given).last_hidden_state
        return hidden, mask, is_text, ids

    def pooled(self, batch: Batch, injection: Injection | None, pool: str) -> Tensor:
        """One vector per row [B, H]: mean over text tokens ("mean"), the state of the row's first slot
        ("first": [CLS] where the layout puts it there), or what the output layer gets at the mask token
        ("mask")."""
        if pool == "mask" and not self.has_lm_head:
            raise BackboneError(f"backbone {self.name!r} has no masked-LM head to read a mask token by")
        hidden, _, is_text, ids = self.states(batch, injection, transformed=pool == "mask")
        if pool == "mean":
            chosen = is_text[..., None]  # [B, S, 1]
            return (widened(hidden) * chosen).sum(dim=1) / chosen.sum(dim=1)
        if pool == "first":
            return hidden[:, 0]
        at_mask = ids == self.tokenizer.mask_token_id
        missing = ~at_mask.any(dim=1)
        if bool(missing.any()):
            raise BackboneError(
                f"row {int(missing.long().argmax())} has no mask token: write {self.tokenizer.mask_token} "
                "into the task's input"
            )
        return hidden[torch.arange(len(batch), device=hidden.device), at_mask.long().argmax(dim=1)]

    def class_logits(self, batch: Batch, injection: Injection | None) -> Tensor:
        """Scores [B, C]; classes that a row's prompt does not have are -inf."""
        batch, injection = self.at(batch, injection)
        if injection is None or injection.readout is None:
            raise BackboneError("an encoder classifies through a read-out: wrap the prompt in Reading(...)")
        readout = injection.readout
        if readout.vectors.shape[2] != self.geometry.hidden:
            raise BackboneError(
                f"the read-out has hidden size {readout.vectors.shape[2]}, backbone {self.name!r} "
                f"{self.geometry.hidden}: use the backbone that the prompt was trained on"
            )
        return self.classed(self.pooled(batch, injection, readout.pool), injection)

    def classed(self, features: Tensor, injection: Injection) -> Tensor:
        """Scores [B, C] of what `pooled` gave [B, H], by the read-out of each row's prompt."""
        readout = injection.readout
        assert readout is not None
        features = widened(features)
        vectors = readout.vectors.to(features)[injection.rows]  # [B, C, H]
        if readout.cosine:
            features = nn.functional.normalize(features, dim=-1)
            vectors = nn.functional.normalize(vectors, dim=-1)
        logits = readout.scale * torch.einsum("bh,bch->bc", features, vectors)
        logits = logits + readout.bias.to(logits)[injection.rows]
        return logits.masked_fill(~readout.live[injection.rows], -torch.inf)

    def _probe_rows(self, count: int, slots: int) -> tuple[Batch, Injection]:
        batch, injection = super()._probe_rows(count, slots)
        return batch, replace(injection, readout=self.readout(["a", "b"], "head"))

    def loss(self, batch: Batch, injection: Injection | None) -> tuple[Tensor, Tensor]:
        logits = self.class_logits(batch, injection)
        choice = batch.choice.to(logits.device)
        if bool((choice < 0).any()):
            raise BackboneError(
                "an encoder learns classes: this task's examples carry no class label; "
                "use a causal or encoder-decoder backbone for free text"
            )
        classes = (logits != -torch.inf).sum(dim=1)
        if bool((choice >= classes).any()):
            row = int((choice >= classes).long().argmax())
            raise BackboneError(
                f"row {row} has class {int(choice[row])}, its prompt knows {int(classes[row])} classes: "
                "use the task that the prompt was made for"
            )
        nll = nn.functional.cross_entropy(logits, choice, reduction="none")
        return nll, torch.ones_like(choice)

    def readout(self, words: Sequence[str], kind: str = "words") -> Readout:
        """The read-out of a task's label words, K = 1. kind: "words" (cosine to their embedding by this
        model), "verbalizer" (masked-LM logit of each word's first piece), "head" (a linear head, starting at
        zero)."""
        classes = len(words)
        live = torch.ones(1, classes, dtype=torch.bool, device=self.device)
        bias = torch.zeros(1, classes, device=self.device)
        if kind == "head":
            vectors = torch.zeros(1, classes, self.geometry.hidden, device=self.device)
            return Readout(vectors, bias, live, "mean")
        if kind == "words":
            vectors = torch.stack([self._word_vector(w) for w in words])[None]
            return Readout(vectors, bias, live, "mean", cosine=True, scale=WORD_SCALE)
        if kind != "verbalizer":
            raise BackboneError(f"unknown read-out {kind!r}: use one of {', '.join(READOUTS)}")
        if not self.has_lm_head or self.tokenizer.mask_token_id is None:
            raise BackboneError(
                f'backbone {self.name!r} has no masked-LM head: read it out by "words" or "head"'
            )
        pieces = [self.text_ids(" " + w) for w in words]  # the mask stands for a word within a text
        firsts = [p[0] for p in pieces if p]
        if len(set(firsts)) < classes:
            raise BackboneError(
                f"a verbalizer needs label words with different first pieces, got {list(words)}: "
                "choose other label words"
            )
        out = self.model.get_output_embeddings()
        with torch.no_grad():
            vectors = out.weight[firsts].float()[None].clone()
            if out.bias is not None:
                bias = out.bias[firsts].float()[None].clone()
        return Readout(vectors, bias, live, "mask")

    def _word_vector(self, word: str) -> Tensor:
        """Mean state of a word read alone between the model's own special tokens [H]."""
        ids = torch.tensor([self.tokenizer(word)["input_ids"]], device=self.device)
        with torch.no_grad():
            states = self.body(
                inputs_embeds=self.embed(ids), attention_mask=torch.ones_like(ids)
            ).last_hidden_state
        vector: Tensor = nn.functional.normalize(states[0].float().mean(dim=0), dim=-1)
        return vector

    def activations(
        self, ids: Sequence[int], sites: Sequence[str]
    ) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        tokens = torch.tensor([list(ids)], device=self.device)

        def run() -> object:
            return self.body(inputs_embeds=self.embed(tokens), attention_mask=torch.ones_like(tokens))

        with torch.no_grad():
            return attend.record(run, {s: self.modules[s] for s in sites})


# 5.23: those whose positions begin behind their padding id
_OFFSET_POSITIONS = frozenset({
    "camembert", "data2vec-text", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
})  # fmt: skip
