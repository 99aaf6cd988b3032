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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer  # 5.23: Cache(layers=[...])
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from incipit.backbones import internals
from incipit.backbones.shared import Shared
from incipit.backbones.shared import attention as beside_shared
from incipit.backbones.stream import Prefix, Stream
from incipit.backbones.stream import attention as two_parts
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


class OwnLayer(DynamicLayer):
    """A growing layer in memory taken once, behind `before` positions that are kept elsewhere.

    5.23: what `update` returns goes to attention, which adds the prefix itself (`Entering.shared`); the lengths
    that mask and position code ask for count the prefix.
    """

    def __init__(self, before: int, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.before, self.room, self.used = before, room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = (
            t.new_empty(*t.shape[:2], self.room, t.shape[3]) for t in (key_states, value_states)
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        start, self.used = self.used, self.used + key_states.shape[2]
        self.keys[:, :, start : self.used] = key_states
        self.values[:, :, start : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def fill(
        self, row: Tensor, step: Tensor, key: Tensor, value: Tensor, size: tuple[int, int], repeats: int
    ) -> None:
        """Hold keys and values [N, M, D] of slots (row, step) [M] of `size` (rows, slots); each row `repeats` times."""
        for name, part in (("keys", key), ("values", value)):
            whole = part.new_zeros(size[0], part.shape[0], self.room, part.shape[2])  # [B, N, room, D]
            whole[row, :, step] = part.transpose(0, 1)
            setattr(self, name, whole.repeat_interleave(repeats, dim=0) if repeats > 1 else whole)
        self.dtype, self.device, self.is_initialized, self.used = key.dtype, key.device, True, size[1]

    def get_seq_length(self) -> int:
        return self.before + self.used

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for tensor in (self.keys, self.values):
            if tensor is not None:
                tensor[:, :, : self.used] = tensor[:, :, : self.used].index_select(
                    0, beam_idx.to(tensor.device)
                )


def own_cache(layers: int, before: int, room: int) -> Cache:
    """A cache for `room` positions of each row, behind `before` that attention adds."""
    return Cache(layers=[OwnLayer(before, room) for _ in range(layers)])


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
    folded: frozenset[int] = frozenset()  # id(module) of those whose keys and values are bare states
    seen: list[tuple[nn.Module, Tensor, Tensor]] | None = None  # recorded (module, key, value), when probing
    shared: Mapping[int, Shared] = field(default_factory=dict)  # id(module) -> prefixes that stand once each
    windows: list[int | None] = field(default_factory=list)  # what each of these was told of a sliding window


_entering: contextvars.ContextVar[Entering | None] = contextvars.ContextVar("incipit_entering", default=None)


@contextmanager
def folding(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block, cross-attentions take bare states for keys and values, beside what is injected."""
    with injected(replace(_entering.get() or Entering(), folded=frozenset(map(id, modules)))):
        yield


@contextmanager
def injected(entering: Entering) -> Iterator[Entering]:
    """Within the block, the registered attention function adds these keys and values."""
    token = _entering.set(entering)
    try:
        yield entering
    finally:
        _entering.reset(token)


class Running(Protocol):
    """One row that is many on its way through a model (`Streaming`, `unpadded.Rows`, `slots.Pass`)."""

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rest: Mapping[str, Any]
    ) -> Tensor:
        """What attention gives [1, M, N, D]; `rest` is what the layer asks for besides."""


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention over [prefix; keys]; outside an `injected` block the stock function.

    A model that is given `incipit_stream` hands it on: its one row is then many (see stream.py, unpadded.py).
    """
    running: Running | None = kwargs.pop("incipit_stream", None)
    if running is not None:
        return running.attention(module, query, key, value, kwargs), None
    entering = _entering.get()
    if entering is not None and entering.seen is not None:
        entering.seen.append((module, key, value))
        entering.windows.append(kwargs.get("sliding_window"))
    if entering is not None and id(module) in entering.shared:
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        beside = entering.shared[id(module)]
        return beside_shared(query, key, value, beside, attention_mask, scaling, kwargs.get("softcap")), None
    if entering is not None and id(module) in entering.folded:
        prefix = None
        if id(module) in entering.at:
            assert entering.live is not None
            prefix = *entering.at[id(module)], entering.live
        scaling = kwargs["scaling"]
        return internals.folded(module, query, key[:, 0], attention_mask, scaling, prefix), None
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
    if kwargs.get("softcap") is not None:
        return _capped(module, query, key, value, attention_mask, **kwargs), None
    learns = query.requires_grad or key.requires_grad
    slow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and learns
    # torch 2.13: the backward of the fused kernel in bfloat16 on a CPU takes ten times that of plain products
    with sdpa_kernel(SDPBackend.MATH) if slow else nullcontext():
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
    return result


def _capped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    softcap: float,
    scaling: float,
    **_: Any,
) -> Tensor:
    """softmax(c tanh(q k^T / c)) v, which the stock function refuses. 5.23: Gemma 2."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.tanh(query @ key.mT * scaling / softcap) * softcap
    if mask is None:
        queries, keys = scores.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    wide = torch.float32 if scores.dtype in (torch.bfloat16, torch.float16) else scores.dtype
    return (scores.softmax(dim=-1, dtype=wide).to(query.dtype) @ value).transpose(1, 2)


def _widened(mask: Tensor, live: Tensor) -> Tensor:
    """Mask [1|B, 1|N, T, S], boolean or additive -> the same over [prefix; keys], [B, 1|N, T, P + S]."""
    batch, (heads, queries) = live.shape[0], mask.shape[1:3]
    front = live[:, None, None, :].expand(-1, heads, queries, -1)  # [B, heads, T, P]
    if mask.dtype != torch.bool:
        front = torch.zeros(front.shape, dtype=mask.dtype, device=mask.device).masked_fill(
            ~front, torch.finfo(mask.dtype).min
        )
    return torch.cat([front, mask.expand(batch, -1, -1, -1)], dim=-1)


@dataclass(frozen=True)
class Streaming:
    """A stream on its way through a causal model, and what each attention module sees before its rows."""

    stream: Stream
    at: Mapping[int, Prefix]  # id(module) -> prefix
    seen: dict[int, tuple[Tensor, Tensor]] | None = (
        None  # filled with each module's keys and values [1, N, M, D]
    )

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rest: Mapping[str, Any]
    ) -> Tensor:
        """5.23: `scaling`, `sliding_window` and `softcap` are what a causal layer may ask for besides."""
        if self.seen is not None:
            self.seen[id(module)] = key, value
        scaling = rest.get("scaling") or query.shape[-1] ** -0.5
        return two_parts(
            query,
            key,
            value,
            self.at.get(id(module)),
            self.stream,
            scaling,
            rest.get("sliding_window"),
            rest.get("softcap"),
        )


def streamed(model: Any, embeds: Tensor, positions: Tensor, running: Running) -> Tensor:
    """Last hidden states [M, H] of the rows of a stream; embeds [M, H], positions [M].

    5.23: a mask of four dimensions is taken as it is, and arguments unknown to the model reach its attention.
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
    out: Tensor = model(
        inputs_embeds=embeds[None],
        position_ids=positions[None],
        attention_mask=mask,
        use_cache=False,
        incipit_stream=running,
    ).last_hidden_state
    return out[0]


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


def attentions(run: Callable[[], object]) -> tuple[list[nn.Module], bool]:
    """The attention modules of a causal model in the order of its layers, and whether some were told a window."""
    with injected(Entering(seen=[])) as entering, torch.no_grad():
        run()
    return [m for m, _, _ in entering.seen or []], any(entering.windows)


def record(
    run: Callable[[], object], modules: Mapping[str, Sequence[nn.Module]]
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Keys and values [B, N, T, D] that each site's modules compute while `run` runs; differentiable."""
    with injected(Entering(seen=[])) as entering:
        run()
    by_id = {id(m): (k, v) for m, k, v in entering.seen or []}
    keys = {s: [by_id[id(m)][0] for m in ms] for s, ms in modules.items()}
    return keys, {s: [by_id[id(m)][1] for m in ms] for s, ms in modules.items()}
