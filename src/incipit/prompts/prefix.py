"""Trained keys and values in every layer: prefix tuning and P-tuning v2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from incipit.errors import PromptError
from incipit.injection import Geometry, Injection
from incipit.prompts.base import RowPrompt, check_length, check_rows, zero_rows


class PrefixPrompt(RowPrompt):
    """softmax(q [P_K; K]^T) [P_V; V]: trained keys and values [N, P, D] before the text's, in each layer.

    Li and Liang 2021, section 4; Liu et al. 2022 (P-tuning v2). `sites` chooses where: encoder, decoder,
    cross. A row [W] is, over sites and layers in order, the flattened keys then values. The learning-rate
    unit of each part is the RMS of its start, so keys and values of different layers move alike. Raises PromptError for
    a site that the backbone lacks, or where it takes no keys and values.
    """

    kind = "prefix"

    def __init__(
        self,
        geometry: Geometry,
        length: int,
        sites: Sequence[str] | None = None,
        rows: Tensor | None = None,
        scales: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.length = check_length(length, geometry)
        self.sites = tuple(sites) if sites is not None else tuple(geometry.sites)
        unknown = [s for s in self.sites if s not in geometry.sites]
        if not geometry.sites:
            why = geometry.why_no_sites or "none of its layers was found to"
            raise PromptError(
                f"this {geometry.family} backbone takes no keys and values: {why}; use an input prompt"
            )
        if unknown or not self.sites:
            raise PromptError(
                f"this {geometry.family} backbone takes keys and values at {', '.join(geometry.sites)}, "
                f"not at {', '.join(map(repr, unknown)) or 'none'}: choose among them, or use an input prompt"
            )
        self._shapes: list[tuple[str, int, str, int, int]] = []  # (site, layer, part, N, D)
        for site in self.sites:
            for layer, shape in enumerate(geometry.sites[site]):
                self._shapes.append((site, layer, "key", shape.kv_heads, shape.head_dim))
                self._shapes.append((site, layer, "value", shape.kv_heads, shape.value_dim))
        self.parts = nn.ParameterList(
            [nn.Parameter(torch.zeros(self.length, n * d)) for *_, n, d in self._shapes]  # each [P, N * D]
        )
        self.scales = list(scales) if scales is not None else [1.0] * len(self._shapes)
        if rows is not None:
            self.set_rows(rows)
            if scales is None:
                self.scales = [_rms(p) for p in self.parts]

    def rows(self) -> Tensor:
        return torch.cat(list(self.parts), dim=1)  # [P, W]

    def place(self, rows: Tensor) -> Injection:
        keys: dict[str, list[Tensor]] = {s: [] for s in self.sites}
        values: dict[str, list[Tensor]] = {s: [] for s in self.sites}
        split = rows.split([n * d for *_, n, d in self._shapes], dim=1)
        for (site, _, part, n, d), block in zip(self._shapes, split, strict=True):
            heads = block.view(rows.shape[0], n, d).transpose(0, 1)[None]  # [1, N, P, D]
            (keys if part == "key" else values)[site].append(heads)
        return Injection(
            rows=zero_rows().to(rows.device),
            keys={s: tuple(k) for s, k in keys.items()},
            values={s: tuple(v) for s, v in values.items()},
        )

    def set_rows(self, rows: Tensor) -> None:
        checked = check_rows(rows, self.length, self.width, "the rows")
        with torch.no_grad():
            for part, block in zip(
                self.parts, checked.split([p.shape[1] for p in self.parts], dim=1), strict=True
            ):
                part.copy_(block)

    @property
    def width(self) -> int:
        return sum(n * d for *_, n, d in self._shapes)

    @property
    def scale(self) -> float:
        return sum(self.scales) / len(self.scales)

    def units(self) -> dict[str, float]:
        return {f"parts.{i}": scale for i, scale in enumerate(self.scales)}

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "length": self.length, "sites": list(self.sites), "scales": self.scales}


def rows_of(keys: Mapping[str, Sequence[Tensor]], values: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """Keys and values of one prompt, site -> per layer [1, N, P, D] -> rows [P, W] in the order of
    PrefixPrompt."""
    blocks = []
    for site in keys:
        for k, v in zip(keys[site], values[site], strict=True):
            blocks += [t[0].transpose(0, 1).flatten(1) for t in (k, v)]  # [P, N * D]
    return torch.cat(blocks, dim=1)


def _rms(tensor: Tensor) -> float:
    return max(float(tensor.detach().float().pow(2).mean().sqrt()), 1e-6)
