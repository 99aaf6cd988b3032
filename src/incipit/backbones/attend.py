"""What attention sees: the way into Hugging Face models. Each touchpoint names the version it was seen in.

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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from incipit.backbones import internals
from incipit.backbones.ending import Asked
from incipit.backbones.ending import attention as at_asked
from incipit.backbones.shared import Shared
from incipit.backbones.shared import attention as beside_shared
from incipit.backbones.stream import Stream
from incipit.backbones.twoparts import Prefix
from incipit.backbones.twoparts import attention as two_parts
from incipit.injection import LayerShape

ATTENTION = "incipit"  # name under which the attention function is registered


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
    """A stream on its way through a causal model, and what each attention module sees before its rows.

    seen: filled with each module's keys and values [1, N, M, D]. last: id of the module at which those are enough.
    wanted: what the last layer is run for, if not for every slot (see `narrow`). asked: the same, once `seen` holds the
    keys and values of that layer.
    """

    stream: Stream
    at: Mapping[int, Prefix]  # id(module) -> prefix
    seen: dict[int, tuple[Tensor, Tensor]] | None = None
    last: int = 0
    wanted: Asked | None = None
    asked: Asked | None = None

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rest: Mapping[str, Any]
    ) -> Tensor:
        """5.23: `scaling`, `sliding_window` and `softcap` are what a causal layer may ask for besides."""
        scaling = rest.get("scaling") or query.shape[-1] ** -0.5
        window, cap = rest.get("sliding_window"), rest.get("softcap")
        prefix = self.at.get(id(module))
        if self.asked is not None:
            assert self.seen is not None
            key, value = self.seen[id(module)]
            return at_asked(query, key, value, prefix, self.stream, self.asked, scaling, window, cap)
        if self.seen is not None:
            self.seen[id(module)] = key, value
        if self.last == id(module):
            raise internals.Reached
        return two_parts(query, key, value, prefix, self.stream, scaling, window, cap)


def streamed(
    model: Any,
    embeds: Tensor,
    positions: Tensor,
    running: Running,
    layer: nn.Module | None = None,
    asked: Asked | None = None,
) -> Tensor:
    """Last hidden states [m, H] at the asked slots of a stream (None: [M, H]); embeds [M, H], positions [M].

    layer: the last one, where it may be run for the asked slots alone (see ending.py), around module `running.last`.
    5.23: a mask of four dimensions is taken as it is, and arguments unknown to the model reach its attention.
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)

    def run(running: Running) -> Tensor:
        out: Tensor = model(
            inputs_embeds=embeds[None],
            position_ids=positions[None],
            attention_mask=mask,
            use_cache=False,
            incipit_stream=running,
        ).last_hidden_state
        return out[0]

    if asked is None:
        return run(running)
    assert isinstance(running, Streaming)
    if layer is None or internals.recomputes(layer) or 2 * len(asked) > len(embeds):
        return run(replace(running, last=0))[asked.slots]
    running = replace(running, seen={} if running.seen is None else running.seen)
    if len(asked):
        return run(replace(running, wanted=asked))
    with suppress(internals.Reached):
        run(running)
    return embeds[:0]


def narrow(layer: nn.Module) -> RemovableHandle:
    """Let a call of `layer` whose stream wants a few slots be two: as it is, as far as its attention; then these alone.

    Other calls are left as they are. Returns what removes the hook.
    """

    def halved(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        running = kwargs.get("incipit_stream")
        if not isinstance(running, Streaming) or running.wanted is None:
            return None
        wanted, size = running.wanted.slots, running.stream.taken.numel()

        def cut(given: Any) -> Any:
            if isinstance(given, Tensor) and given.ndim > 1 and given.shape[:2] == (1, size):
                return given[:, wanted]
            return type(given)(map(cut, given)) if isinstance(given, (tuple, list)) else given

        with suppress(internals.Reached):
            module(*args, **kwargs | {"incipit_stream": replace(running, wanted=None)})
        then = replace(running, wanted=None, asked=running.wanted)
        return cut(args), {name: cut(each) for name, each in kwargs.items()} | {"incipit_stream": then}

    return layer.register_forward_pre_hook(halved, with_kwargs=True)


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


def attentions(run: Callable[[], object]) -> tuple[list[nn.Module], tuple[LayerShape, ...], bool]:
    """The attention modules of a causal model in the order of its layers, the shapes of their keys and values, and
    whether some were told a window."""
    with injected(Entering(seen=[])) as entering, torch.no_grad():
        run()
    seen = entering.seen or []
    shapes = tuple(LayerShape(k.shape[1], k.shape[3], v.shape[3]) for _, k, v in seen)
    return [m for m, _, _ in seen], shapes, any(entering.windows)


def record(
    run: Callable[[], object], modules: Mapping[str, Sequence[nn.Module]]
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Keys and values [B, N, T, D] that each site's modules compute while `run` runs; differentiable."""
    with injected(Entering(seen=[])) as entering:
        run()
    by_id = {id(m): (k, v) for m, k, v in entering.seen or []}
    keys = {s: [by_id[id(m)][0] for m in ms] for s, ms in modules.items()}
    return keys, {s: [by_id[id(m)][1] for m in ms] for s, ms in modules.items()}
