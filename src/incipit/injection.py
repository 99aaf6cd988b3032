"""Injection: what enters the frozen model, where, and what is read where. Geometry: the shapes a model
offers.

# B batch, K distinct prompts, P length, H hidden, L layers, N key/value heads, D head dim, C classes
Data is stored once per distinct prompt; `rows` says which prompt a row of the batch reads. Positions are
right-aligned: of P slots the live ones stand at the end, next to the text, so a row has no gap. Those that `behind`
names stand on the text's other side, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from incipit.errors import PromptError

SITES = ("encoder", "decoder", "cross")
WITHIN = ("all", "before", "itself")


@dataclass(frozen=True)
class LayerShape:
    """Key/value heads N and head dim D of one attention layer (D of values may differ)."""

    kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True)
class Geometry:
    """The shapes of a backbone, all that a Prompt knows of it.

    family: "causal", "encoder-decoder" or "encoder". hidden: H. vocab: V. max_length: positions, prompt
    included. embedding_rms: root mean square of the coordinates of all token embeddings; the unit of the
    learning rate. sites: per site the shape of every layer that can take keys and values; why_no_sites says
    why there is none. isolates: whether a prompt can be read without seeing the input; why_joint says why not.
    """

    family: str
    hidden: int
    vocab: int
    embedding_rms: float
    max_length: int
    sites: Mapping[str, tuple[LayerShape, ...]] = field(default_factory=dict)
    why_no_sites: str = ""
    isolates: bool = False
    why_joint: str = ""


@dataclass(frozen=True)
class Readout:
    """logits = scale * f(pooled) . vectors + bias: class scores of an encoder, per distinct prompt.

    vectors [K, C, H], bias [K, C], live [K, C] bool (prompts with fewer classes). f normalises when `cosine`.
    pool: "mean" over text tokens, "first" (the row's first slot: [CLS] where the layout puts it there), or
    "mask" (the state at the mask token, through the model's own masked-LM transform).
    """

    vectors: Tensor
    bias: Tensor
    live: Tensor
    pool: str = "mean"
    cosine: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        k, c, _ = self.vectors.shape
        if tuple(self.bias.shape) != (k, c) or tuple(self.live.shape) != (k, c):
            raise PromptError(
                f"readout vectors {tuple(self.vectors.shape)} need bias and live of shape {(k, c)}, "
                f"got {tuple(self.bias.shape)} and {tuple(self.live.shape)}"
            )

    def to(self, device: torch.device | str) -> Readout:
        """The same read-out on another device."""
        return replace(
            self, vectors=self.vectors.to(device), bias=self.bias.to(device), live=self.live.to(device)
        )

    def way(self) -> tuple[str, bool, float]:
        """What must agree for readouts to share a batch."""
        return self.pool, self.cosine, self.scale


@dataclass(frozen=True)
class Injection:
    """What enters the frozen model.

    rows [B] int64: row i reads prompt rows[i]. inputs [K, P, H]: virtual token embeddings, before the
    (encoder) input tokens. keys, values: site -> per layer [K, N, P', D], seen before the inputs. live [K, P]
    and key_live [K, P'] bool: which positions exist. isolated: the input tokens see the prompt, the prompt sees
    itself alone; what was prefilled so has keys that stand at the P' positions right before the text (others have
    no position). behind [K, P] bool: which of the inputs stand behind the input tokens, before the token that ends
    them; such a prompt depends on the input in every family. within: which inputs of a prompt one of them sees: all,
    those before it and itself, or only itself. Raises PromptError when shapes disagree.
    """

    rows: Tensor
    inputs: Tensor | None = None
    keys: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    values: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    live: Tensor | None = None
    key_live: Tensor | None = None
    readout: Readout | None = None
    isolated: bool = False
    behind: Tensor | None = None
    within: str = "all"

    def __post_init__(self) -> None:
        if set(self.keys) != set(self.values):
            raise PromptError(f"keys are given at {sorted(self.keys)} but values at {sorted(self.values)}")
        if self.behind is not None:
            self._check_behind(self.behind)
        if self.within not in WITHIN or (self.within != "all" and self.inputs is None):
            raise PromptError(
                f"within = {self.within!r} is one of {', '.join(WITHIN)}, and says what inputs see"
            )
        if (
            self.isolated
            and self.keys
            and (self.inputs is not None or set(self.keys) != {"encoder", "cross"})
        ):
            raise PromptError(
                f"an isolated prompt enters at the input alone, this one at {_places(self)}: keys and values "
                "never see the input, so leave them joint"
            )
        if self.inputs is None and not self.keys and self.readout is None:
            raise PromptError("an Injection carries nothing: give inputs, keys and values, or a readout")
        if self.inputs is not None:
            self._check("live", [("inputs", self.inputs.shape[:2])])
        if self.keys:
            self._check("key_live", [s for site in self.keys for s in self._site_shapes(site)])
        on_host = self.rows.device.type == "cpu"  # elsewhere the question would wait for all that runs there
        if on_host and self.rows.numel() and (int(self.rows.min()) < 0 or int(self.rows.max()) >= self.count):
            raise PromptError(
                f"rows must lie in 0..{self.count - 1} (K = {self.count}), "
                f"got {int(self.rows.min())}..{int(self.rows.max())}"
            )

    def _check_behind(self, behind: Tensor) -> None:
        if self.inputs is None or behind.shape != self.inputs.shape[:2]:
            of = "no inputs" if self.inputs is None else f"inputs of [K, P] = {tuple(self.inputs.shape[:2])}"
            raise PromptError(f"behind {tuple(behind.shape)} says where rows stand, and there are {of}")
        if self.keys or self.isolated:
            what = "keys and values enter" if self.keys else "an isolated prompt stands"
            raise PromptError(f"{what} before every input, so no rows stand behind it: write {{input}} last")

    def _site_shapes(self, site: str) -> list[tuple[str, torch.Size]]:
        if site not in SITES:
            raise PromptError(f"unknown site {site!r}: use one of {', '.join(SITES)}")
        keys, values = self.keys[site], self.values[site]
        if len(keys) != len(values):
            raise PromptError(f"site {site!r} has {len(keys)} layers of keys but {len(values)} of values")
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            if k.shape[:3] != v.shape[:3]:
                raise PromptError(
                    f"site {site!r} layer {layer}: keys {tuple(k.shape)} and values {tuple(v.shape)} "
                    "differ in [K, N, P]"
                )
        return [(f"{site} layer {i}", torch.Size((k.shape[0], k.shape[2]))) for i, k in enumerate(keys)]

    def _check(self, mask: str, shapes: list[tuple[str, torch.Size]]) -> None:
        live = getattr(self, mask)
        if live is None:
            live = torch.ones(shapes[0][1], dtype=torch.bool, device=self.rows.device)
            object.__setattr__(self, mask, live)
        for name, shape in shapes:
            if shape != live.shape:
                raise PromptError(f"{name} has [K, P] = {tuple(shape)} but {mask} is {tuple(live.shape)}")

    @property
    def count(self) -> int:
        """K, the number of distinct prompts."""
        for live in (self.live, self.key_live):
            if live is not None:
                return int(live.shape[0])
        assert self.readout is not None
        return int(self.readout.vectors.shape[0])

    @property
    def length(self) -> int:
        """Positions beside the text: P + P', dead ones included."""
        return sum(int(live.shape[1]) for live in (self.live, self.key_live) if live is not None)

    @property
    def empty(self) -> bool:
        """Whether nothing enters the model (only a readout is carried)."""
        return self.inputs is None and not self.keys

    def to(self, device: torch.device | str) -> Injection:
        """The same injection on another device; differentiable."""
        target = torch.device(device)
        if all(t.device == target for t in self._tensors()):
            return self

        def moved(sites: Mapping[str, tuple[Tensor, ...]]) -> dict[str, tuple[Tensor, ...]]:
            return {site: tuple(t.to(device) for t in layers) for site, layers in sites.items()}

        names = ("rows", "inputs", "live", "key_live", "readout", "behind")
        given = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        there: dict[str, Any] = {n: t.to(device) for n, t in given.items()}
        return replace(self, keys=moved(self.keys), values=moved(self.values), **there)

    def _tensors(self) -> Iterator[Tensor]:
        """All of its numbers."""
        yield self.rows
        yield from (t for t in (self.inputs, self.live, self.key_live, self.behind) if t is not None)
        yield from (t for sites in (self.keys, self.values) for layers in sites.values() for t in layers)
        if self.readout is not None:
            yield from (self.readout.vectors, self.readout.bias, self.readout.live)

    def with_rows(self, rows: Tensor) -> Injection:
        """The same prompts, read by other rows [B]."""
        return replace(self, rows=rows)

    @staticmethod
    def stack(parts: Sequence[Injection], rows: Tensor) -> Injection:
        """K injections of one prompt each -> one of K prompts; shorter ones are padded at the front, dead.

        Raises PromptError when the parts enter at different places or are read in different ways.
        """
        if len(parts) == 1:
            return parts[0].with_rows(rows)
        first = parts[0]
        for i, part in enumerate(parts):
            same = (part.inputs is None) == (first.inputs is None) and set(part.keys) == set(first.keys)
            if not same:
                raise PromptError(
                    f"prompt {i} enters elsewhere than prompt 0 ({_places(part)} against "
                    f"{_places(first)}): run them in separate batches, or prefill both"
                )
            if (part.isolated, part.within) != (first.isolated, first.within):
                raise PromptError(
                    f"prompt {i} is {_attention(part)}, prompt 0 {_attention(first)}: run them in separate batches"
                )
        inputs = live = key_live = behind = None
        if first.inputs is not None:
            length = max(_some(p.live).shape[1] for p in parts)
            if any(p.behind is not None for p in parts):
                sides = [p.behind if p.behind is not None else torch.zeros_like(_some(p.live)) for p in parts]
                behind = torch.cat([_grown(side, length, 1) for side in sides])  # [K, P]
            live = torch.cat([_grown(_some(p.live), length, 1) for p in parts])  # [K, P]
            inputs = torch.cat([_grown(_some(p.inputs), length, 1) for p in parts])  # [K, P, H]
        keys: dict[str, tuple[Tensor, ...]] = {}
        values: dict[str, tuple[Tensor, ...]] = {}
        if first.keys:
            length = max(_some(p.key_live).shape[1] for p in parts)
            key_live = torch.cat([_grown(_some(p.key_live), length, 1) for p in parts])  # [K, P']
            for site in first.keys:  # per layer [K, N, P', D]
                keys[site] = _joined([p.keys[site] for p in parts], length)
                values[site] = _joined([p.values[site] for p in parts], length)
        readout = _stack_readouts([p.readout for p in parts])
        return Injection(
            rows, inputs, keys, values, live, key_live, readout, first.isolated, behind, first.within
        )


def _grown(tensor: Tensor, length: int, dim: int) -> Tensor:
    """Pad dimension `dim` at its front to `length`."""
    behind = (0, 0) * (tensor.dim() - 1 - dim)
    return F.pad(tensor, (*behind, length - tensor.shape[dim], 0))


def _joined(parts: Sequence[tuple[Tensor, ...]], length: int) -> tuple[Tensor, ...]:
    return tuple(torch.cat([_grown(t, length, 2) for t in layer]) for layer in zip(*parts, strict=True))


def _places(part: Injection) -> str:
    return " + ".join((["inputs"] if part.inputs is not None else []) + sorted(part.keys)) or "nowhere"


def _attention(part: Injection) -> str:
    return ("isolated" if part.isolated else "joint") + ("" if part.within == "all" else f" ({part.within})")


def _some(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _stack_readouts(parts: Sequence[Readout | None]) -> Readout | None:
    readouts = [p for p in parts if p is not None]
    if not readouts:
        return None
    if len(readouts) != len(parts) or len({r.way() for r in readouts}) != 1:
        raise PromptError(
            "prompts of one batch must be read out the same way (label words, verbalizer or head): "
            "run the others in a batch of their own"
        )
    classes = max(r.vectors.shape[1] for r in readouts)

    def grown(r: Readout) -> tuple[Tensor, Tensor, Tensor]:
        more = classes - r.vectors.shape[1]
        return F.pad(r.vectors, (0, 0, 0, more)), F.pad(r.bias, (0, more)), F.pad(r.live, (0, more))

    vectors, bias, live = (torch.cat(ts) for ts in zip(*(grown(r) for r in readouts), strict=True))
    return replace(readouts[0], vectors=vectors, bias=bias, live=live)
