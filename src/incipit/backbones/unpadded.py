"""Encoder rows without padding, where positions are relative: softmax(q [Kp; K]^T + b) [Vp; V] row by row.

# B batch, S padded row, K prompts, M slots of the stream, C slots of a chunk, N heads, R rows and W slots of a block,
# P length, D head dim, H hidden
The rows lie end to end (stream.py), and the stream is cut into chunks of C slots wherever they fall: all layers but
attention treat slots alike, and attention is told where rows begin.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from incipit.backbones import internals
from incipit.backbones.alike import Alike
from incipit.backbones.stream import Block, Stream
from incipit.backbones.twoparts import Prefix

CHUNK = 32  # the model computes position biases C x C that nobody reads; the last chunk is padded


@dataclass
class Rows:
    """Rows on their way through an encoder. live [M]: slots that are no padding of a block.

    at: id(module) -> what its rows see before themselves. holders: id(module) -> the module with its bias.
    positioned: such a prefix stands at the P positions right before each row; else it has no position.
    alike: slots that enter the first layer with the same numbers.
    """

    laid: Stream
    live: Tensor
    at: Mapping[int, Prefix]
    holders: Mapping[int, nn.Module]
    positioned: bool
    alike: Alike | None = None
    known: dict[int, list[Tensor]] = field(
        default_factory=dict
    )  # id(holder) -> what is added to scores, by block

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rest: Mapping[str, Any]
    ) -> Tensor:
        """query, key, value [M / C, N, C, D] -> [M / C, C, N, D]; differentiable, also in the prefix."""
        prefix, holder = self.at.get(id(module)), self.holders[id(module)]
        if id(holder) not in self.known:
            self.known[id(holder)] = [self._added(b, holder, prefix, query.dtype) for b in self.laid.blocks]
        flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]  # [M, N, D]
        learns = any(t.requires_grad for t in (query, key, value))
        slow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and learns
        done: list[Tensor] = []
        # torch 2.13: the backward of the fused kernel in bfloat16 on a CPU takes ten times that of plain products
        with sdpa_kernel(SDPBackend.MATH) if slow else nullcontext():
            for block, added in zip(self.laid.blocks, self.known[id(holder)], strict=True):
                q, k, v = (_rows(t, block) for t in flat)  # [R, N, W, D]
                if prefix is not None:
                    k = torch.cat([self._before(prefix.keys, block).to(k.dtype), k], dim=2)
                    v = torch.cat([self._before(prefix.values, block).to(v.dtype), v], dim=2)
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=rest.get("scaling"))
                done.append(out.transpose(1, 2).flatten(0, 1))  # [size, N, D]
        slots = sum(b.size for b in self.laid.blocks)
        if slots < flat[0].shape[0]:  # the end of the last chunk
            done.append(torch.zeros_like(flat[2][slots:]))
        chunked: Tensor = torch.cat(done).unflatten(0, (query.shape[0], query.shape[2]))
        return chunked

    def _added(self, block: Block, holder: nn.Module, prefix: Prefix | None, dtype: torch.dtype) -> Tensor:
        """Position bias and mask of a block [1 | R, N, W, P + W]."""
        bias = internals.bias_before(holder, block.width, 0, block.width)  # [1, N, W, W]
        alive = self.live[block.slots].view(-1, block.width)  # [R, W]
        if prefix is not None:
            length = prefix.keys.shape[2]
            if self.positioned:
                bias = internals.bias_before(holder, block.width, length, length + block.width)
            else:
                bias = F.pad(bias, (length, 0))
            seen = prefix.live if prefix.live is not None else alive.new_ones(prefix.keys.shape[0], length)
            alive = torch.cat([self._before(seen, block), alive], dim=1)  # [R, P + W]
        bias = bias.to(dtype)
        if bool(alive.all()):
            return bias
        return torch.where(alive[:, None, None], bias, torch.finfo(dtype).min)

    def _before(self, prefix: Tensor, block: Block) -> Tensor:
        """[K, ...] of all prompts -> [R, ...] of a block's rows; a view for one prompt."""
        if len(prefix) == 1:
            return prefix.expand(block.rows, *prefix.shape[1:])
        return prefix[self.laid.reads[block.slots][:: block.width]]


def _rows(slots: Tensor, block: Block) -> Tensor:
    """[M, N, D] -> the rows of a block [R, N, W, D], a view."""
    part = slots[block.slots]
    split: Tensor = part.unflatten(0, (-1, block.width))
    return split.transpose(1, 2)


def encoded(encoder: Any, embeds: Tensor, rows: Rows) -> Tensor:
    """Padded rows [B, S, H] -> their last states [B, S, H]; what stands at padding is arbitrary.

    5.23: a mask of four dimensions is taken as it is, and arguments unknown to the model reach its attention.
    """
    taken = rows.laid.taken
    slots = embeds.flatten(0, 1)[taken]  # [M, H]
    chunks = F.pad(slots, (0, 0, 0, -len(taken) % CHUNK)).unflatten(0, (-1, CHUNK))
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
    out = encoder(inputs_embeds=chunks, attention_mask=mask, incipit_stream=rows).last_hidden_state
    states = out.flatten(0, 1)[: len(taken)]
    padded = states.new_zeros(embeds.shape[0] * embeds.shape[1], states.shape[1])
    whole: Tensor = padded.index_copy(0, taken, states).unflatten(0, embeds.shape[:2])
    return whole
