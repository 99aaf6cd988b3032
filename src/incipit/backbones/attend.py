"""The one file that knows Hugging Face internals. Each touchpoint names the version it was seen in.

# B batch, K prompts, P length, T text, N key/value heads, D head dim
Two routes for keys and values:
- a causal model takes them as a cache (`prefix_cache`), so positions go on after the prefix;
- an encoder, or any site of an encoder-decoder, takes them in its attention function (`injected`), where they
  have no position. transformers 5.23: `AttentionInterface` and `AttentionMaskInterface` in modeling_utils,
  masking_utils.
"""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer  # 5.23: Cache(layers=[...])
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from incipit.injection import LayerShape

ATTENTION = "incipit"  # name under which the attention function is registered


class SharedLayer(DynamicLayer):
    """update(k, v) = ([prefix; k], [prefix; v]), with gradient: a cache layer that stores nothing.

    5.23: the layer's `update`, `get_mask_sizes` and `get_seq_length` decide what attention and mask code see.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.prefix = keys, values
        self.keys, self.values = self.prefix  # where the base class looks for the length
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.prefix
        return (
            torch.cat([keys.to(key_states.dtype), key_states], dim=-2),
            torch.cat([values.to(value_states.dtype), value_states], dim=-2),
        )


def prefix_cache(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: Tensor,
    dtype: torch.dtype,
    *,
    grows: bool,
    repeats: int = 1,
) -> Cache:
    """Per-layer [K, N, P, D] -> a cache of B rows; one distinct prompt is expanded as a view, never copied.

    grows: a growing cache for generation (its rows repeated for beams); otherwise a read-only one. dtype is
    the model's: a growing layer joins what it is given as it is.
    """

    def spread(tensor: Tensor) -> Tensor:
        tensor = tensor.to(dtype)
        if tensor.shape[0] == 1:
            return tensor.expand(rows.shape[0] * repeats, -1, -1, -1)
        return tensor[rows.repeat_interleave(repeats)]  # [B * repeats, N, P, D]

    layers: list[Any] = []
    for key, value in zip(keys, values, strict=True):
        if grows:
            layer = DynamicLayer()
            layer.lazy_initialization(key.to(dtype), value.to(dtype))
            layer.keys, layer.values = spread(key), spread(value)
        else:
            layer = SharedLayer(spread(key), spread(value))
        layers.append(layer)
    return Cache(layers=layers)


def fresh_cache(layers: int) -> Cache:
    """An empty cache that keeps every position, also in sliding-window layers."""
    return Cache(layers=[DynamicLayer() for _ in range(layers)])


def cached(cache: Cache) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Keys and values of a cache, per layer [B, N, P, D]."""
    layers: list[Any] = cache.layers
    return tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers)


@dataclass
class Entering:
    """What attention adds at each module: id(module) -> (keys, values) [B, N, P, D]; live [B, P]."""

    at: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    live: Tensor | None = None
    seen: list[tuple[nn.Module, Tensor, Tensor]] | None = None  # recorded (module, key, value), when probing


_entering: contextvars.ContextVar[Entering | None] = contextvars.ContextVar("incipit_entering", default=None)


@contextmanager
def injected(entering: Entering) -> Iterator[Entering]:
    """Within the block, the registered attention function adds these keys and values."""
    token = _entering.set(entering)
    try:
        yield entering
    finally:
        _entering.reset(token)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention over [prefix; keys]; outside an `injected` block the stock function."""
    entering = _entering.get()
    if entering is not None and entering.seen is not None:
        entering.seen.append((module, key, value))
    if entering is not None and id(module) in entering.at:
        prefix_key, prefix_value = entering.at[id(module)]
        assert entering.live is not None
        length, queries, old = prefix_key.shape[2], query.shape[2], key.shape[2]
        if attention_mask is None:  # sdpa's own causal shortcut would cut the prefix off
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", False) if causal is None else causal
            plain = torch.ones(1, 1, queries, old, dtype=torch.bool, device=key.device)
            attention_mask = plain.tril(old - queries) if causal else plain  # [1, 1, T, S]
        attention_mask = _widened(attention_mask, entering.live)
        key = torch.cat([prefix_key.to(key.dtype), key], dim=2)  # [B, N, P + S, D]
        value = torch.cat([prefix_value.to(value.dtype), value], dim=2)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = F.pad(kwargs["position_bias"], (length, 0))  # a prefix has no position
        kwargs["is_causal"] = False
    slow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad
    # torch 2.13: the backward of the fused kernel in bfloat16 on a CPU takes ten times that of plain products
    with sdpa_kernel(SDPBackend.MATH) if slow else nullcontext():
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
    return result


def _widened(mask: Tensor, live: Tensor) -> Tensor:
    """Mask [1|B, 1|N, T, S], boolean or additive -> the same over [prefix; keys], [B, 1|N, T, P + S]."""
    batch, (heads, queries) = live.shape[0], mask.shape[1:3]
    front = live[:, None, None, :].expand(-1, heads, queries, -1)  # [B, heads, T, P]
    if mask.dtype != torch.bool:
        front = torch.zeros(front.shape, dtype=mask.dtype, device=mask.device).masked_fill(
            ~front, torch.finfo(mask.dtype).min
        )
    return torch.cat([front, mask.expand(batch, -1, -1, -1)], dim=-1)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def quiet() -> Iterator[None]:
    """Bars and advice of the model library stay off the user's screen."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def use_interface(model: Any, name: str = ATTENTION) -> str:
    """Ask the model to call our attention function (or another); returns the name of the one before.

    5.23: a model whose attention does not go through the interface only logs a warning here, so that success
    is seen by counting calls alone (`probe_sites`).
    """
    before = str(model.config._attn_implementation)
    with quiet():
        model.set_attn_implementation(name)
    return before


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


def head_of(model: Any) -> Callable[[Tensor], Tensor]:
    """hidden [M, H] -> logits [M, V]: the output head with what the model does to logits.

    5.23: final_logit_softcapping (Gemma 2), logit_scale (Cohere), logits_scaling (Granite). The caller checks
    the result against the model's own logits and falls back to the full forward where it differs.
    """
    head = model.get_output_embeddings()
    text = model.config.get_text_config()
    cap = getattr(text, "final_logit_softcapping", None)
    scale = getattr(text, "logit_scale", None)
    divide = getattr(text, "logits_scaling", None)

    def logits(hidden: Tensor) -> Tensor:
        out: Tensor = head(hidden)
        out = out * scale if scale else out
        out = out / divide if divide else out
        return torch.tanh(out / cap) * cap if cap else out

    return logits


def probe_sites(
    model: nn.Module, run: Callable[[], object], encoder: nn.Module | None, cross_length: int
) -> dict[str, list[tuple[nn.Module, LayerShape]]]:
    """Run the model once and list, per site, the attention modules that our function saw, in order.

    `encoder` is the encoder of an encoder-decoder; a decoder module with keys of `cross_length` is
    cross-attention.
    """
    inside = {id(m) for m in encoder.modules()} if encoder is not None else None
    with injected(Entering(seen=[])) as entering, torch.no_grad():
        run()
    found: dict[str, list[tuple[nn.Module, LayerShape]]] = {}
    for module, key, value in entering.seen or []:
        if inside is None or id(module) in inside:
            site = "encoder"
        else:
            site = "cross" if key.shape[2] == cross_length else "decoder"
        found.setdefault(site, []).append((module, LayerShape(key.shape[1], key.shape[3], value.shape[3])))
    return found


def record(
    run: Callable[[], object], modules: Mapping[str, Sequence[nn.Module]]
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Keys and values [B, N, T, D] that each site's modules compute while `run` runs."""
    with injected(Entering(seen=[])) as entering, torch.no_grad():
        run()
    by_id = {id(m): (k, v) for m, k, v in entering.seen or []}
    keys = {s: [by_id[id(m)][0] for m in ms] for s, ms in modules.items()}
    return keys, {s: [by_id[id(m)][1] for m in ms] for s, ms in modules.items()}


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
