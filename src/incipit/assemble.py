"""Backbone + label words + a few choices -> a Prompt at its start: layout, initial values, read-out.

# P length, H hidden, W width of a row
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from incipit.backbones import Backbone, EncoderBackbone
from incipit.errors import PromptError, nearest
from incipit.prompts import (
    ATTENTIONS,
    Framed,
    InputPrompt,
    PrefixPrompt,
    Prompt,
    Reading,
    Reparametrised,
    RowPrompt,
    split_layout,
)
from incipit.prompts.prefix import rows_of
from incipit.prompts.starts import DRAWN, STARTS, Slots, labelled, sampled, worded

KINDS = ("input", "prefix", "none")


@dataclass(frozen=True)
class PromptChoice:
    """How a prompt is made.

    kind: "input" (rows before the input), "prefix" (keys and values in every layer), "none" (constant text alone).
    start: see prompts/starts.py; text for the start "text"; given(backbone) -> rows [P, W] for the start "given".
    layout: constant text around {soft} and, where it does not stand last, {input}; "" for the family's own.
    vocabulary: how many pieces are sampled from.
    reparametrise: "", "mlp" or "lstm" with `hidden` units. readout: "words", "verbalizer" or "head" (encoders).
    attention: "joint" (prompt and input see each other) or "isolated" (the prompt sees only itself), either with
    "-causal" (a row sees those before it of the prompt) or "-alone" (none of them).
    """

    kind: str = "input"
    length: int = 20
    start: str = "label"
    text: str = ""
    given: Callable[[Backbone], Tensor] | None = None
    layout: str = ""
    sites: tuple[str, ...] = ()
    reparametrise: str = ""
    hidden: int = 128
    vocabulary: int = 5000
    readout: str = "words"
    attention: str = "joint"


def make_prompt(
    choice: PromptChoice, backbone: Backbone, words: Sequence[str] = (), seed: int = 0
) -> Prompt | None:
    """A prompt at its start, on the backbone's device; None where nothing at all would enter the model.

    Raises PromptError for what does not fit: unknown kind or start, more labels than rows, a text that is missing.
    """
    if choice.kind not in KINDS:
        raise PromptError(f"unknown prompt kind {choice.kind!r}" + nearest(choice.kind, KINDS))
    if choice.attention not in ATTENTIONS:
        raise PromptError(
            f"unknown prompt attention {choice.attention!r}" + nearest(choice.attention, ATTENTIONS)
        )
    rows = None if choice.kind == "none" else _started(choice, backbone, words, seed)
    inner: Prompt | None = rows
    if rows is not None and choice.reparametrise:
        inner = Reparametrised(rows, choice.reparametrise, choice.hidden, seed)
    prompt = framed(inner, backbone, choice.layout or default_layout(choice.kind, backbone))
    if (seen := ATTENTIONS[choice.attention]) is not None:
        if prompt is None:
            raise PromptError(
                f'prompt.attention = "{choice.attention}": there is no prompt to isolate; write constant text into the '
                "layout"
            )
        prompt = seen[0](backbone.geometry, prompt, seen[1])
    if isinstance(backbone, EncoderBackbone):
        if not words:
            raise PromptError(
                f"backbone {backbone.name!r} is an encoder and classifies: this task has no label words; "
                "use a causal or encoder-decoder backbone"
            )
        if prompt is None:
            raise PromptError("an encoder needs at least its first token: write {bos} into the layout")
        prompt = Reading(prompt, backbone.readout(words, choice.readout), trained=choice.readout == "head")
    return prompt.to(backbone.device) if prompt is not None else None


def default_layout(kind: str, backbone: Backbone) -> str:
    """{bos} first where rows enter at the input; after keys and values, which stand before every input."""
    return "{soft}{bos}" if kind == "prefix" else "{bos}{soft}"


def framed(inner: Prompt | None, backbone: Backbone, layout: str) -> Prompt | None:
    """The layout's constant text around a prompt; the prompt itself when there is none."""
    read = split_layout(layout)
    if inner is not None and "{soft}" not in read.pieces:
        raise PromptError(f"layout {layout!r} has no place for the soft rows: write {{soft}} into it")
    ids = [[] if piece == "{soft}" else backbone.layout_ids(piece) for piece in read.pieces]
    before, after = ([i for part in some for i in part] for some in (ids[: read.soft], ids[read.soft :]))
    behind = sum(map(len, ids[read.input :]))
    if inner is not None and read.soft >= read.input:
        behind += 1
    if not before and not after and not behind:
        return inner
    return Framed(backbone.geometry, inner, before, after, backbone.embed, behind)


def _started(choice: PromptChoice, backbone: Backbone, words: Sequence[str], seed: int) -> RowPrompt:
    geometry, length = backbone.geometry, choice.length
    if choice.start not in STARTS:
        raise PromptError(f"unknown start {choice.start!r}" + nearest(choice.start, STARTS))
    if choice.kind == "prefix" and not geometry.sites:
        raise PromptError(
            f"backbone {backbone.name!r} takes no keys and values: its attention does not go through the "
            'attention interface; use prompt.kind = "input"'
        )
    prompt: RowPrompt
    if choice.kind == "prefix":
        prompt = PrefixPrompt(geometry, length, choice.sites or None)
    else:
        prompt = InputPrompt(geometry, length)
    if choice.start == "given":
        if choice.given is None:
            raise PromptError(
                "the start 'given' needs prompt.source: an artifact folder, an .npy file or a PEFT adapter"
            )
        rows = choice.given(backbone)
    elif choice.start in DRAWN and choice.kind == "input":
        rows = DRAWN[choice.start](length, prompt.width, geometry.embedding_rms, seed)
    else:
        slots = _slots(choice, backbone, words, seed)
        rows = _embedded(slots, backbone) if choice.kind == "input" else _activated(slots, backbone, prompt)
    if choice.kind == "prefix":  # the units are the RMS of real activations, also for a random start
        return _prefix(choice, backbone, rows, seed)
    prompt.set_rows(rows)
    return prompt


def _prefix(choice: PromptChoice, backbone: Backbone, rows: Tensor, seed: int) -> PrefixPrompt:
    prompt = PrefixPrompt(backbone.geometry, choice.length, choice.sites or None, rows=rows.float().cpu())
    if choice.start in DRAWN:
        noise = DRAWN[choice.start](choice.length, prompt.width, 1.0, seed)
        scales = torch.cat(
            [torch.full((p.shape[1],), s) for p, s in zip(prompt.parts, prompt.scales, strict=True)]
        )
        prompt.set_rows(noise * scales)
    return prompt


def _slots(choice: PromptChoice, backbone: Backbone, words: Sequence[str], seed: int) -> Slots:
    """Per row the ids it starts at."""
    rest = sampled(backbone.frequent_ids(choice.vocabulary), choice.length, seed)
    if choice.start == "label":
        return (
            labelled([backbone.pair_ids(" ", w)[1] or backbone.text_ids(w) for w in words], rest)
            if words
            else rest
        )
    if choice.start == "text":
        return worded(backbone.text_ids(choice.text), rest)
    return rest


def _embedded(slots: Slots, backbone: Backbone) -> Tensor:
    """Mean of the piece embeddings of each slot, [P, H]."""
    with torch.no_grad():
        return torch.stack([backbone.embed(slot).float().mean(dim=0) for slot in slots]).cpu()


def _activated(slots: Slots, backbone: Backbone, prompt: RowPrompt) -> Tensor:
    """Keys and values that the model computes for the slots' ids read as a text, [P, W]."""
    assert isinstance(prompt, PrefixPrompt)
    ids = [i for slot in slots for i in slot][: prompt.length]
    keys, values = backbone.activations(ids, prompt.sites)
    chosen = {s: keys[s] for s in prompt.sites}
    return rows_of(chosen, {s: values[s] for s in prompt.sites}).float().cpu()
