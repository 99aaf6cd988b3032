"""What Hugging Face models and configurations do not say by their forward. With attend.py, all that knows internals.

# B batch, S row, T text, K prompts, P length, M positions, H hidden, V vocabulary, N heads, D head dim
Each touchpoint names the version that it was seen in.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

# What a model raises that cannot be called in the way tried: it is then used in the plainer way.
FAULTS = (TypeError, ValueError, AttributeError, IndexError, RuntimeError)


def positions_accepted(model: Any) -> bool:
    """Whether the model's forward takes position_ids."""
    return "position_ids" in inspect.signature(model.forward).parameters


def stateful(model: Any) -> bool:
    """Whether the model carries a recurrent state beside keys and values. 5.23: `_is_stateful`."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    linear = {kind for kind in kinds if "linear" in kind or "mamba" in kind or "recurrent" in kind}
    return bool(getattr(model, "_is_stateful", False) or linear)


def slides(config: Any) -> bool:
    """Whether some layer sees only a window, so that gaps inside a row would change what it sees."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ()
    return bool(getattr(text, "sliding_window", None)) or any("sliding" in k or "chunked" in k for k in kinds)


def steady_positions(text: Any) -> int:
    """How many positions turn alike whatever else a pass holds; 0 for no bound.

    5.23: with the rope_type "longrope" (Phi 3) one position beyond `original_max_position_embeddings` turns all rows of
    the pass by other frequencies, and those before it were cached under the first. "dynamic" changes only beyond
    `max_position_embeddings`.
    """
    ropes = getattr(text, "rope_parameters", None) or {}
    each = [
        r for r in (ropes, *ropes.values()) if isinstance(r, Mapping) and r.get("rope_type") == "longrope"
    ]
    bounds = [
        r.get("original_max_position_embeddings") or text.original_max_position_embeddings for r in each
    ]
    return min(map(int, bounds), default=0)


def per_layer_embeddings(config: Any) -> bool:
    """Whether layers look ids up for themselves; virtual tokens have none. 5.23: Gemma 3n and 4."""
    return bool(getattr(config.get_text_config(), "hidden_size_per_layer_input", 0))


def load_options(config: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    """Extra arguments of from_pretrained. 5.23: experts run by a grouped product that refuses float64."""
    text = config.get_text_config()
    experts = getattr(text, "num_local_experts", 0) or getattr(text, "num_experts", 0)
    return {"experts_implementation": "eager"} if experts and dtype == torch.float64 else {}


def lacking(info: Mapping[str, Any]) -> list[str]:
    """Weights that the files lack and that were drawn at random. 5.23: from_pretrained's loading info.

    A pooler is left out: nothing here reads it, and sentence encoders are saved without.
    """
    return sorted(str(k) for k in info.get("missing_keys", ()) if "pooler" not in str(k))


@dataclass(frozen=True)
class Head:
    """hidden [M, H] -> logits [M, V]: the output head with what the model does to logits.

    5.23: final_logit_softcapping (Gemma 2), logit_scale (Cohere), logits_scaling (Granite), scale_decoder_outputs
    (T5 with tied embeddings; UMT5 and Switch always scale), final_logits_bias (BART). The caller checks the
    result against the model's own logits and falls back to the full forward where it differs.
    """

    layer: Any
    tied: float | None
    shift: Tensor | None
    scale: float | None
    divide: float | None
    cap: float | None

    def __call__(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.layer(hidden * self.tied if self.tied else hidden)
        out = out + self.shift[0] if self.shift is not None else out
        out = out * self.scale if self.scale else out
        out = out / self.divide if self.divide else out
        return torch.tanh(out / self.cap) * self.cap if self.cap else out


def head_of(model: Any) -> Head:
    """The head of a model."""
    text = model.config.get_text_config()
    scales = getattr(text, "scale_decoder_outputs", text.model_type in ("umt5", "switch_transformers"))
    return Head(
        model.get_output_embeddings(),
        tied=text.d_model**-0.5 if scales else None,
        shift=getattr(model, "final_logits_bias", None),
        scale=getattr(text, "logit_scale", None),
        divide=getattr(text, "logits_scaling", None),
        cap=getattr(text, "final_logit_softcapping", None),
    )


class _BeforeOutput(TorchFunctionMode):
    """Within the block (of this thread) the output layer hands on what it is given, in place of logits."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and args[1] is self.weight:
            return args[0]
        return func(*args, **(kwargs or {}))


def before_output(model: Any, **inputs: Tensor) -> Tensor:
    """What the masked-LM output layer multiplies [B, S, H]: its logits are this . W + b.

    5.23: what stands before that layer is called `cls`, `lm_head`, `head`, `vocab_transform`, ... and is run
    by the model's own forward. The caller checks the result once against the model's own logits.
    """
    with _BeforeOutput(model.get_output_embeddings().weight):
        out: Tensor = model(**inputs).logits
    return out


def encoder_output(hidden: Tensor) -> object:
    """Encoder states in the form that `generate` accepts."""
    return BaseModelOutput(last_hidden_state=hidden)


def alphabet_first(tokenizer: Any) -> bool:
    """Whether the vocabulary opens with its alphabet, in no order of frequency: WordPiece and BPE do, Unigram not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return type(getattr(backend, "model", None)).__name__ in ("WordPiece", "BPE")


def recompute(model: Any, on: bool) -> None:
    """Layers keep their inputs only and are computed again in the backward pass.

    5.23: a GradientCheckpointingLayer does so while it is in training mode; its parts stay in evaluation mode, so
    that nothing is dropped out. Raises ValueError for a model that does not support it.
    """
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before 5.23
    if on:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = on


class Reached(Exception):
    """The attention of the last layer has been given its keys and values."""


def last_layer(body: nn.Module, attention: nn.Module) -> nn.Module | None:
    """The layer around `attention`, where it is the last of a list of layers. 5.23: `layers`, `h`."""
    lists = (m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m))
    return next((each[-1] for each in lists if any(m is attention for m in each[-1].modules())), None)


def recomputes(layer: nn.Module) -> bool:
    """Whether the layer is computed again in the backward pass, see `recompute`."""
    return bool(layer.training and getattr(layer, "gradient_checkpointing", False))


def bias_holders(modules: Sequence[nn.Module]) -> list[nn.Module] | None:
    """Per layer the module that holds its relative position bias; None where a layer has none.

    5.23: T5Attention.has_relative_attention_bias. T5, T5 v1.1 and mT5 hand layer 0's on; UMT5 has one a layer.
    """
    holders: list[nn.Module] = []
    for module in modules:
        if getattr(module, "has_relative_attention_bias", False) and hasattr(module, "compute_bias"):
            holders.append(module)
        elif holders:
            holders.append(holders[-1])
        else:
            return None
    return holders


def bias_before(holder: Any, queries: int, length: int, keys: int) -> Tensor:
    """[1, N, T, S]: relative bias of T positions of a text to S keys, of which the first P stand right before it.

    5.23: compute_bias.
    """
    bias: Tensor = holder.compute_bias(queries, keys, past_seen_tokens=length)
    return bias


def projected(modules: Sequence[Any], states: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Encoder states [K, P, H] -> keys and values [K, N, P, D] of each cross-attention.

    5.23: `k`, `v` and `key_value_proj_dim` in T5 and its kin; `k_proj`, `v_proj` and `head_dim` in BART and its.
    """

    def heads(module: Any, name: str) -> Tensor:
        old = hasattr(module, name)
        layer, size = (name, "key_value_proj_dim") if old else (f"{name}_proj", "head_dim")
        flat: Tensor = getattr(module, layer)(states)  # [K, P, N * D]
        split: Tensor = flat.unflatten(2, (-1, getattr(module, size)))
        return split.transpose(1, 2)

    return tuple(heads(m, "k") for m in modules), tuple(heads(m, "v") for m in modules)


def projections(attention: Any) -> list[nn.Module]:
    """What makes queries, keys and values of an encoder's states; [] where that is not three plain products.

    5.23: `q`, `k` and `v` in T5 and its kin.
    """
    layers: list[nn.Module | None] = [getattr(attention, name, None) for name in ("q", "k", "v")]
    found: list[nn.Module] = [m for m in layers if type(m) is nn.Linear]
    return found if len(found) == 3 else []


def position_table(decoder: nn.Module) -> nn.Embedding | None:
    """The table by which a decoder's tokens know their place, learned or of sines; None where it has none.

    5.23: `embed_positions` of BART, mBART, PLBart, Pegasus, Marian, Blenderbot. Of M2M100 it is no table.
    """
    table = getattr(decoder, "embed_positions", None)
    return table if isinstance(table, nn.Embedding) else None


class _Placed(TorchFunctionMode):
    """Within the block (of this thread) slot m of a row [1, M] is looked up in the table as if it stood at depth[m]."""

    def __init__(self, table: nn.Embedding, depth: Tensor) -> None:
        super().__init__()
        self.weight, self.shift = table.weight, depth - torch.arange(len(depth), device=depth.device)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.embedding and args[1] is self.weight:
            args = (args[0] + self.shift, *args[1:])
        return func(*args, **(kwargs or {}))


def decoder_stream(decoder: Any, ids: Tensor, depth: Tensor, running: object) -> Tensor:
    """Last states [M, H] of a decoder's rows, one token each [1, M], at depth [M]; all attention is left to `running`.

    5.23: masks of four dimensions are taken as they are, and arguments unknown to the decoder reach its attention. What
    it projects of the one encoder state is not read.
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    weight, table = decoder.get_input_embeddings().weight, position_table(decoder)
    with _Placed(table, depth) if table is not None else nullcontext():
        out: Tensor = decoder(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=weight.new_zeros(1, 1, weight.shape[1]),
            encoder_attention_mask=mask,
            use_cache=False,
            incipit_stream=running,
        ).last_hidden_state
    return out[0]


def unprojected(modules: Sequence[Any]) -> bool:
    """Whether each cross-attention is q k^T with plain products for keys and values, so that it can be `folded`.

    5.23: T5Attention's k and v, without a bias.
    """
    plain = all(
        type(layer) is nn.Linear and layer.bias is None
        for module in modules
        for layer in (getattr(module, "k", None), getattr(module, "v", None))
    )
    return bool(modules) and plain


def states_as_keys(states: Tensor, layers: int) -> object:
    """A cache by which cross-attention gets the encoder's states [B, S, H] as keys and values [B, 1, S, H].

    5.23: a layer of T5 takes keys and values from a cross_attention_cache that is not empty, and projects nothing.
    """
    given: Any = DynamicLayer()
    given.lazy_initialization(states[:, None], states[:, None])
    given.keys = given.values = states[:, None]
    return EncoderDecoderCache(DynamicCache(), Cache(layers=[given] * layers))


def folded(
    module: Any,
    query: Tensor,
    states: Tensor,
    mask: Tensor | None,
    scaling: float,
    prefix: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """softmax([q Kp^T, (q Wk) h^T]) [Vp; h Wv^T]: attention to states h [B, S, H] that are never projected.

    query [B, N, U, D] -> [B, U, N, D]; mask [B, 1, 1 | U, S] bool; prefix: keys and values [1 | B, N, P, D], live
    [B, P]. For U < D queries this is less work than projecting S states.
    """
    batch, heads, queries, size = query.shape
    query = query * scaling
    within = module.k.weight.unflatten(0, (heads, size))  # [N, D, H]
    wide = (query.transpose(0, 1).flatten(1, 2) @ within).unflatten(1, (batch, queries))  # [N, B, U, H]
    scores = (wide.transpose(0, 1).flatten(1, 2) @ states.mT).unflatten(1, (heads, queries))  # [B, N, U, S]
    least = torch.finfo(scores.dtype).min
    if mask is not None:
        scores = scores.masked_fill(~mask, least)
    length = 0
    if prefix is not None:
        keys, values, live = prefix
        length = keys.shape[2]
        front = _shared(query, keys.mT).masked_fill(~live[:, None, None], least)  # [B, N, U, P]
        scores = torch.cat([front, scores], dim=-1)
    exact = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=exact).to(query.dtype)
    mixed = (weights[..., length:].flatten(1, 2) @ states).unflatten(1, (heads, queries))  # [B, N, U, H]
    outside = module.v.weight.unflatten(0, (heads, size)).mT  # [N, H, D]
    out: Tensor = (
        (mixed.transpose(0, 1).flatten(1, 2) @ outside).unflatten(1, (batch, queries)).transpose(0, 1)
    )
    if prefix is not None:
        out = out + _shared(weights[..., :length], values)
    return out.transpose(1, 2)


def _shared(rows: Tensor, own: Tensor) -> Tensor:
    """rows [B, N, U, X] @ own [1 | B, N, X, Y]; what all rows share is one product."""
    if own.stride(0) and own.shape[0] > 1:
        return rows @ own.to(rows.dtype)
    flat = rows.transpose(0, 1).flatten(1, 2) @ own[0].to(rows.dtype)  # [N, B * U, Y]
    split: Tensor = flat.unflatten(1, (rows.shape[0], rows.shape[2]))
    return split.transpose(0, 1)
