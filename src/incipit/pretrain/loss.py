"""nll = -log softmax(W h)[y]: the model's own loss, where only label positions reach the head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from incipit.backbones import autocast
from incipit.batch import IGNORE, Batch, Encoded, collate

# B rows, T text length, U target length, N label tokens, H hidden, V vocabulary


class _TokenLoss(torch.autograd.Function):
    """nll_i = -log softmax(W h_i)[y_i] with one [N, V] softmax kept, in the dtype of h.

    The gradient of the logits is softmax - onehot; the weights of the rows enter through h, not [N, V].
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """states [N, H], weight [V, H], targets [N] -> nll [N] float32."""
        head = weight.to(states.dtype)
        share = torch.softmax(states @ head.T, dim=-1)  # [N, V]
        own = torch.arange(len(targets), device=targets.device)
        picked = share[own, targets]  # [N]
        share[own, targets] = picked - 1  # in place: scatter_add_ copies all of it
        ctx.save_for_backward(states, head, share)
        return -picked.float().clamp_min(1e-38).log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        states, head, share = ctx.saved_tensors
        scale = grads[0][:, None].to(states.dtype)  # [N, 1]
        return (share @ head) * scale, (share.T @ (states * scale)).float(), None


def token_loss(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """nll [N] of targets [N] under softmax(weight [V, H] states [N, H])."""
    nll: Tensor = _TokenLoss.apply(states, weight, targets)  # type: ignore[no-untyped-call]
    return nll


def objective(model: Any) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """Batch -> (nll [B], count [B]) of the model's own loss; only label positions reach the head."""
    causal = not model.config.is_encoder_decoder

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        if causal:  # every row fills its block, so joining needs no gaps: [B, 1] + [B, T - 1]
            ids = torch.cat([batch.input_ids, batch.target_ids], dim=1)  # [B, T]
            states = model.model(input_ids=ids, use_cache=False).last_hidden_state
            states = states[:, batch.input_ids.shape[1] - 1 : -1]  # [B, T - 1, H]
        else:
            start = torch.full_like(batch.target_ids[:, :1], model.config.decoder_start_token_id)
            shifted = _widened(torch.cat([start, batch.target_ids[:, :-1]], dim=1))
            ids, seen = _widened(batch.input_ids), _widened(batch.input_mask)
            encoded = model.encoder(input_ids=ids, attention_mask=seen).last_hidden_state
            states = model.decoder(
                input_ids=shifted, encoder_hidden_states=encoded, encoder_attention_mask=seen, use_cache=False
            ).last_hidden_state[:, : batch.labels.shape[1]]
            states = states * model.config.d_model**-0.5  # the scale of a T5 whose head is its embedding
        kept = batch.labels != IGNORE  # [B, U]
        chosen = states[kept]  # [N, H]
        if torch.is_autocast_enabled(chosen.device.type):
            chosen = chosen.to(torch.bfloat16)
        with torch.autocast(chosen.device.type, enabled=False):
            asked = _widened(batch.labels[kept][None], 256)[0]  # [N + more]
            rows = F.pad(chosen, (0, 0, 0, len(asked) - len(chosen)))
            each = token_loss(rows, model.lm_head.weight, asked)[: len(chosen)]  # [N]
        owner = kept.nonzero()[:, 0]  # row of each label token
        nll = torch.zeros(len(batch), device=each.device).index_add(0, owner, each)
        return nll, kept.sum(1)

    return run


def _widened(ids: Tensor, to: int = 32) -> Tensor:
    """[B, T] with zeros (False) after it, up to a multiple of `to`: few shapes recur, and a CPU keeps what it has
    prepared for a shape."""
    return F.pad(ids, (0, -ids.shape[1] % to))


def held_out(
    loss: Callable[[Batch], tuple[Tensor, Tensor]],
    rows: Sequence[Encoded],
    precision: str,
    micro_batch: int = 16,
) -> dict[str, float]:
    """exp(mean nll of a label token) over fixed rows."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    nll = count = 0.0
    with torch.no_grad(), autocast(torch.device("cpu"), precision):
        for first in range(0, len(ordered), micro_batch):
            sums, counts = loss(collate(ordered[first : first + micro_batch]))
            nll, count = nll + float(sums.double().sum()), count + float(counts.sum())
    return {"perplexity": math.exp(nll / count), "nll": nll / count, "tokens": count}
