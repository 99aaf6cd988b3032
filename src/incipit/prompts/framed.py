"""Constant text around the soft rows, before or behind the input; and a classifier's read-out beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from incipit.errors import PromptError, nearest
from incipit.injection import Geometry, Injection, Readout
from incipit.prompts.base import Prompt, check_length, prefixed, zero_rows

Embed = Callable[[Sequence[int]], Tensor]  # ids [A] -> embeddings [A, H]
_PART = re.compile(r"\{(\w+)\}")
_NAMES = ("soft", "bos", "eos", "input")


@dataclass(frozen=True)
class Layout:
    """A layout, read. pieces: {bos}, {eos}, {soft} and texts, in order. input: how many of them stand before the
    input."""

    pieces: tuple[str, ...]
    input: int

    @property
    def soft(self) -> int:
        """Where {soft} stands among the pieces; behind all of them where there is none."""
        return self.pieces.index("{soft}") if "{soft}" in self.pieces else len(self.pieces)


def split_layout(layout: str) -> Layout:
    """ "{bos}You are a router. {soft}" -> its pieces; the input stands last where {input} does not say otherwise.

    Raises PromptError for an unknown name, and for {soft} or {input} twice.
    """
    pieces, at = [], 0
    for match in _PART.finditer(layout):
        if match.start() > at:
            pieces.append(layout[at : match.start()])
        if match.group(1) not in _NAMES:
            raise PromptError(
                f"layout {layout!r}: unknown part {{{match.group(1)}}}" + nearest(match.group(1), _NAMES)
            )
        pieces.append(match.group(0))
        at = match.end()
    if at < len(layout):
        pieces.append(layout[at:])
    for once in ("{soft}", "{input}"):
        if (count := pieces.count(once)) > 1:
            raise PromptError(f"layout {layout!r} names {once} {count} times: once is possible")
    place = pieces.index("{input}") if "{input}" in pieces else len(pieces)
    return Layout(tuple(p for p in pieces if p != "{input}"), place)


class Framed(Prompt):
    """[A; P; C]: constant embeddings A [A, H] and C [C, H] before and after a prompt's rows (or none).

    All stand before the input, or the last of them behind it (`prefix_prompt` and `suffix_prompt` of the code of
    Lester et al. 2021): behind counts these from the end, one for each constant row and one for P. With an inner
    prompt of keys and values only C is possible: keys stand before every input.
    """

    kind = "framed"

    def __init__(
        self,
        geometry: Geometry,
        inner: Prompt | None,
        before: Sequence[int],
        after: Sequence[int],
        embed: Embed,
        behind: int = 0,
    ) -> None:
        super().__init__()
        self.geometry, self.inner, self.behind = geometry, inner, behind
        self.before_ids, self.after_ids = tuple(before), tuple(after)
        self.length = (inner.length if inner is not None else 0) + len(before) + len(after)
        most = len(before) + len(after) + (inner is not None)
        if not isinstance(behind, int) or not 0 <= behind <= most:
            raise PromptError(
                f"{behind!r} of {most} parts cannot stand behind the input: the spec was damaged"
            )
        if self.length:
            check_length(self.length, geometry)
        self.register_buffer("before", _constant(embed, before, geometry), persistent=False)  # [A, H]
        self.register_buffer("after", _constant(embed, after, geometry), persistent=False)  # [C, H]
        self.before: Tensor
        self.after: Tensor
        if inner is not None and inner.injection().keys and (before or behind):
            raise PromptError(
                "keys and values enter before every input, so a prefix prompt takes constant text "
                'after {soft} only, and the input after that: write the layout as "{soft}..."'
            )

    @property
    def rows_behind(self) -> int:
        """How many of the A + P + C rows stand behind the input."""
        if self.inner is None or self.behind <= len(self.after_ids):
            return self.behind
        return self.behind - 1 + self.inner.length

    def injection(self) -> Injection:
        part = self.inner.injection() if self.inner is not None else None
        blocks = [self.before, part.inputs[0] if part and part.inputs is not None else None, self.after]
        rows = torch.cat([b for b in blocks if b is not None])  # [A + P + C, H]
        behind = None
        if self.behind:
            behind = (torch.arange(len(rows), device=rows.device) >= len(rows) - self.rows_behind)[None]
        if part is None:
            return Injection(rows=zero_rows().to(rows.device), inputs=rows[None], behind=behind)
        live = None
        if part.live is not None:
            ones = (part.live.new_ones(1, len(self.before_ids)), part.live.new_ones(1, len(self.after_ids)))
            live = torch.cat([ones[0], part.live, ones[1]], dim=1)
        inputs = rows[None] if rows.shape[0] else None
        return replace(part, inputs=inputs, live=live, behind=behind)

    def bake(self) -> Prompt:
        if self.inner is None or self.inner.bake() is self.inner:
            return self
        return self.around(self.inner.bake())

    def around(self, inner: Prompt) -> Framed:
        """The same constant text around another prompt."""
        rows = {self.before_ids: self.before, self.after_ids: self.after}
        framed = Framed(
            self.geometry, inner, self.before_ids, self.after_ids, lambda i: rows[tuple(i)], self.behind
        )
        return framed.to(self.before.device)

    def units(self) -> dict[str, float]:
        return prefixed("inner", self.inner.units()) if self.inner is not None else {}

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "before": list(self.before_ids),
            "after": list(self.after_ids),
            "inner": self.inner.spec() if self.inner is not None else None,
        } | ({"behind": self.behind} if self.behind else {})


def _constant(embed: Embed, ids: Sequence[int], geometry: Geometry) -> Tensor:
    """Constant rows [A, H] in the backbone's precision, on the CPU like the parameters of a fresh prompt."""
    return embed(ids).detach().cpu() if ids else torch.zeros(0, geometry.hidden)


class Reading(Prompt):
    """A prompt together with the read-out of an encoder: frozen class vectors, or a trained linear head.

    `readout` has K = 1: vectors [1, C, H]. `trained` makes vectors and bias parameters (a linear head).
    """

    kind = "reading"

    def __init__(self, inner: Prompt, readout: Readout, trained: bool = False) -> None:
        super().__init__()
        self.inner, self.length, self.trained = inner, inner.length, trained
        self.pool, self.cosine, self.scale = readout.way()
        if trained:
            self.vectors: Tensor = nn.Parameter(
                readout.vectors.detach().to(torch.float32).clone()
            )  # [1, C, H]
            self.bias: Tensor = nn.Parameter(readout.bias.detach().to(torch.float32).clone())  # [1, C]
        else:
            self.register_buffer("vectors", readout.vectors.detach().to(torch.float32), persistent=True)
            self.register_buffer("bias", readout.bias.detach().to(torch.float32), persistent=True)

    def injection(self) -> Injection:
        part = self.inner.injection()
        live = torch.ones(self.bias.shape, dtype=torch.bool, device=self.bias.device)
        readout = Readout(self.vectors, self.bias, live, self.pool, self.cosine, self.scale)
        return replace(part, readout=readout)

    def bake(self) -> Prompt:
        baked = self.inner.bake()
        return self if baked is self.inner else self.around(baked)

    def around(self, inner: Prompt) -> Reading:
        """The same read-out, with numbers of its own, beside another prompt."""
        live = torch.ones(self.bias.shape, dtype=torch.bool)
        vectors, bias = (t.detach().clone() for t in (self.vectors, self.bias))
        return Reading(inner, Readout(vectors, bias, live, self.pool, self.cosine, self.scale), self.trained)

    def units(self) -> dict[str, float]:
        own = {"vectors": 1.0, "bias": 1.0} if self.trained else {}
        return {**own, **prefixed("inner", self.inner.units())}

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "trained": self.trained,
            "pool": self.pool,
            "cosine": self.cosine,
            "scale": self.scale,
            "classes": int(self.bias.shape[1]),
            "width": int(self.vectors.shape[2]),
            "inner": self.inner.spec(),
        }
