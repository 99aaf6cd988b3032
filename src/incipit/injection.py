"""Injection: what enters the frozen model, where, and what is read where. Geometry: the shapes a model offers.

# B batch, K distinct prompts, P length, H hidden, L layers, N key/value heads, D head dim, C classes
Data is stored once per distinct prompt; `rows` says which prompt a row of the batch reads. Positions are
right-aligned: of P slots the live ones stand at the end, next to the text, so a row has no gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from incipit.errors import PromptError

SITES = ("encoder", "decoder", "cross")


@dataclass(frozen=True)
class LayerShape:
    """Key/value heads N and head dim D of one attention layer (D of values may differ)."""

    kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True)
class Geometry:
    """The shapes of a backbone, all that a Prompt knows of it.

    family: "causal", "encoder-decoder" or "encoder". hidden: H. vocab: V. max_length: positions, prompt included.
    embedding_rms: root mean square of the coordinates of all token embeddings; the unit of the learning rate.
    sites: per site the shape of every layer that can take keys and values (empty: that site takes none).
    """

    family: str
    hidden: int
    vocab: int
    embedding_rms: float
    max_length: int
    sites: Mapping[str, tuple[LayerShape, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Readout:
    """logits = scale * f(pooled) . vectors + bias: class scores of an encoder, per distinct prompt.

    vectors [K, C, H], bias [K, C], live [K, C] bool (prompts with fewer classes). f normalises when `cosine`.
    pool: "mean" over text tokens, "first", or "mask" (the state at the mask token, through the model's own
    masked-LM transform).
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

    def way(self) -> tuple[str, bool, float]:
        """What must agree for readouts to share a batch."""
        return self.pool, self.cosine, self.scale


@dataclass(frozen=True)
class Injection:
    """What enters the frozen model.

    rows [B] int64: row i reads prompt rows[i]. inputs [K, P, H]: virtual token embeddings, before the (encoder)
    input tokens. keys, values: site -> per layer [K, N, P, D]. live [K, P] bool: which positions exist.
    Raises PromptError when shapes disagree.
    """

    rows: Tensor
    inputs: Tensor | None = None
    keys: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    values: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    live: Tensor | None = None
    readout: Readout | None = None

    def __post_init__(self) -> None:
        if set(self.keys) != set(self.values):
            raise PromptError(f"keys are given at {sorted(self.keys)} but values at {sorted(self.values)}")
        if self.inputs is None and not self.keys and self.readout is None:
            raise PromptError("an Injection carries nothing: give inputs, keys and values, or a readout")
        shapes = [("inputs", self.inputs.shape[:2])] if self.inputs is not None else []
        for site in self.keys:
            if site not in SITES:
                raise PromptError(f"unknown site {site!r}: use one of {', '.join(SITES)}")
            if len(self.keys[site]) != len(self.values[site]):
                raise PromptError(f"site {site!r} has {len(self.keys[site])} layers of keys, "
                                  f"{len(self.values[site])} of values")
            for layer, (k, v) in enumerate(zip(self.keys[site], self.values[site], strict=True)):
                if k.shape[:3] != v.shape[:3]:
                    raise PromptError(f"site {site!r} layer {layer}: keys {tuple(k.shape)} and "
                                      f"values {tuple(v.shape)} differ in [K, N, P]")
                shapes.append((f"{site} layer {layer}", torch.Size((k.shape[0], k.shape[2]))))
        if shapes and self.live is None:
            object.__setattr__(self, "live", torch.ones(shapes[0][1], dtype=torch.bool, device=self.rows.device))
        for name, shape in shapes:
            assert self.live is not None
            if shape != self.live.shape:
                raise PromptError(f"{name} has [K, P] = {tuple(shape)} but live is {tuple(self.live.shape)}")
        if self.rows.numel() and (int(self.rows.min()) < 0 or int(self.rows.max()) >= self.count):
            raise PromptError(f"rows must lie in 0..{self.count - 1} (K = {self.count}), "
                              f"got {int(self.rows.min())}..{int(self.rows.max())}")

    @property
    def count(self) -> int:
        """K, the number of distinct prompts."""
        if self.live is not None:
            return int(self.live.shape[0])
        assert self.readout is not None
        return int(self.readout.vectors.shape[0])

    @property
    def length(self) -> int:
        """P, the number of positions, dead ones included."""
        return 0 if self.live is None else int(self.live.shape[1])

    @property
    def empty(self) -> bool:
        """Whether nothing enters the model (only a readout is carried)."""
        return self.inputs is None and not self.keys

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
                raise PromptError(f"prompt {i} enters elsewhere than prompt 0 ({_places(part)} against "
                                  f"{_places(first)}): run them in separate batches, or prefill both")
        length = max(p.length for p in parts)
        live = None
        if not first.empty:
            live = torch.cat([F.pad(_live(p), (length - p.length, 0)) for p in parts])  # [K, P]
        inputs = None
        if first.inputs is not None:
            inputs = torch.cat([F.pad(_some(p.inputs), (0, 0, length - p.length, 0)) for p in parts])  # [K, P, H]

        def joined(which: str, site: str) -> tuple[Tensor, ...]:
            layers = zip(*(getattr(p, which)[site] for p in parts), strict=True)
            return tuple(
                torch.cat([F.pad(t, (0, 0, length - t.shape[2], 0)) for t in layer]) for layer in layers
            )  # each [K, N, P, D]

        return Injection(
            rows=rows,
            inputs=inputs,
            keys={s: joined("keys", s) for s in first.keys},
            values={s: joined("values", s) for s in first.keys},
            live=live,
            readout=_stack_readouts([p.readout for p in parts]),
        )


def _places(part: Injection) -> str:
    return " + ".join((["inputs"] if part.inputs is not None else []) + sorted(part.keys)) or "nowhere"


def _some(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _live(part: Injection) -> Tensor:
    return _some(part.live)


def _stack_readouts(parts: Sequence[Readout | None]) -> Readout | None:
    readouts = [p for p in parts if p is not None]
    if not readouts:
        return None
    if len(readouts) != len(parts) or len({r.way() for r in readouts}) != 1:
        raise PromptError("prompts of one batch must be read out the same way (label words, verbalizer or head): "
                          "run the others in a batch of their own")
    classes = max(r.vectors.shape[1] for r in readouts)

    def grown(r: Readout) -> tuple[Tensor, Tensor, Tensor]:
        more = classes - r.vectors.shape[1]
        return F.pad(r.vectors, (0, 0, 0, more)), F.pad(r.bias, (0, more)), F.pad(r.live, (0, more))

    vectors, bias, live = (torch.cat(ts) for ts in zip(*(grown(r) for r in readouts), strict=True))
    return replace(readouts[0], vectors=vectors, bias=bias, live=live)
