"""One row by itself through a model's own cache: slow, and right wherever the model is.

# P length, T positions, H hidden, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from incipit.backbones import caches
from incipit.backbones.causal import CausalBackbone
from incipit.backbones.encdec import EncoderDecoderBackbone
from incipit.injection import Injection, LayerShape


@dataclass
class Alone:
    """A row that is being written. cache: the model's; used: positions in it, and live ones among these."""

    cache: Any
    seen: Tensor  # [1, used] int64


def opened(backbone: CausalBackbone, prompt: Injection | None) -> Alone:
    """A row behind a prompt of keys and values (K = 1), or behind nothing."""
    if prompt is None or not prompt.keys:
        empty = torch.zeros(1, 0, dtype=torch.int64, device=backbone.device)
        return Alone(caches.fresh_cache(backbone.layers), empty)
    assert prompt.key_live is not None
    alive = prompt.key_live[0]
    keys, values = ([t[:, :, alive] for t in at["decoder"]] for at in (prompt.keys, prompt.values))
    cache = caches.prefix_cache(keys, values, prompt.rows[:1], backbone.dtype, grows=True)
    return Alone(cache, torch.ones(1, int(alive.sum()), dtype=torch.int64, device=backbone.device))


def advanced(backbone: CausalBackbone, row: Alone, embeds: Tensor) -> Tensor:
    """Logits [1, V] after embeds [T, H] more."""
    given: dict[str, object] = {}
    if backbone.takes_positions:
        steps = torch.arange(len(embeds), device=embeds.device)
        given["position_ids"] = (row.seen.shape[1] + steps)[None]
    row.seen = torch.cat([row.seen, row.seen.new_ones(1, len(embeds))], dim=1)
    model = backbone.body if backbone.direct_head else backbone.model
    out = model(
        inputs_embeds=embeds[None],
        attention_mask=row.seen,
        past_key_values=row.cache,
        use_cache=True,
        **given,
    )
    logits: Tensor = (
        backbone.head(out.last_hidden_state[:, -1]) if backbone.direct_head else out.logits[:, -1]
    )
    return logits


def shapes(backbone: CausalBackbone) -> tuple[LayerShape, ...]:
    """Heads and sizes of each layer's keys and values, found by reading one token."""
    cache = caches.fresh_cache(backbone.layers)
    with torch.no_grad():
        one = backbone.embed([0])[None]
        backbone.body(inputs_embeds=one, past_key_values=cache, use_cache=True)
    keys, values = caches.cached(cache)
    return tuple(LayerShape(k.shape[1], k.shape[3], v.shape[3]) for k, v in zip(keys, values, strict=True))


def decoded(
    backbone: EncoderDecoderBackbone,
    hidden: Tensor,
    prompt: Injection | None,
    ids: list[int],
) -> Tensor:
    """Logits [1, V] after the decoder has read `ids` behind encoder states [1, S, H]; nothing is kept."""
    tokens = torch.tensor([[*ids, backbone.pad_id]], device=backbone.device)
    keep = torch.zeros_like(tokens, dtype=torch.bool)
    keep[0, -1] = True
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=backbone.device)
    with backbone.entering(prompt, among=("decoder", "cross")):
        return backbone.target_logits(hidden, mask, tokens, keep)
