"""Backbones whose attention takes keys and values directly (encoder, decoder and cross sites).

# B batch, K prompts, P length, N key/value heads, D head dim
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from incipit.backbones import attend, internals
from incipit.backbones.base import Backbone, near
from incipit.injection import SITES, Injection, LayerShape

NO_INTERFACE = "its attention does not go through the attention interface of transformers"


class SiteBackbone(Backbone):
    """modules: site -> the attention modules of its layers, in order; found by running the model once."""

    modules: dict[str, list[nn.Module]]

    def _find_sites(
        self, run: Callable[[], Tensor], encoder: nn.Module | None, cross_length: int = -1
    ) -> None:
        """Fill `modules` and `geometry.sites`, or say in `geometry.why_no_sites` and `notes` why there are
        none."""
        self.modules = {}
        stock = attend.use_interface(self.model)
        try:
            why = self._probe_sites(run, encoder, cross_length)
        except internals.FAULTS as error:
            why = f"its attention cannot be called with a prefix ({str(error).splitlines()[0]})"
        if why:
            self.modules = {}
            attend.use_interface(self.model, stock)
            self.geometry = replace(self.geometry, sites={}, why_no_sites=why)
            self.notes.append(f"no keys and values can be given to {self.name!r} (prefix prompts): {why}")

    def _probe_sites(self, run: Callable[[], Tensor], encoder: nn.Module | None, cross_length: int) -> str:
        found = attend.probe_sites(self.model, run, encoder, cross_length)
        if not found:
            return NO_INTERFACE
        self.modules = {site: [m for m, _ in found[site]] for site in SITES if site in found}
        if any(len({id(m) for m in ms}) < len(ms) for ms in self.modules.values()):
            return "its layers share one attention module"
        shapes = {site: tuple(shape for _, shape in found[site]) for site in self.modules}
        self.geometry = replace(self.geometry, sites=shapes)
        with torch.no_grad():
            plain = run()
            for site in self.modules:
                for live in (False, True):  # a dead position must change nothing, a live one something
                    with self.entering(self._zeros(site, shapes[site], live)):
                        if near(plain, run(), 1e-7 if live else 1e-5) == live:
                            return f"a prefix at its {site} does not act as it should"
        return ""

    def _zeros(self, site: str, shapes: Sequence[LayerShape], live: bool) -> Injection:
        """One position of zeros in every layer of a site."""

        def block(heads: int, size: int) -> Tensor:
            return torch.zeros(1, heads, 1, size, dtype=self.dtype, device=self.device)

        return Injection(
            torch.zeros(1, dtype=torch.int64, device=self.device),
            keys={site: tuple(block(s.kv_heads, s.head_dim) for s in shapes)},
            values={site: tuple(block(s.kv_heads, s.value_dim) for s in shapes)},
            key_live=torch.tensor([[live]], device=self.device),
        )

    @contextmanager
    def entering(self, injection: Injection | None, among: Sequence[str] = SITES) -> Iterator[None]:
        """Within the block, attention sees the injection's keys and values at the sites `among`.

        The injection has been checked against the model (`Backbone.at`).
        """
        if injection is None or not injection.keys:
            yield
            return
        assert injection.key_live is not None
        rows = injection.rows

        def spread(tensor: Tensor) -> Tensor:  # [K, N, P, D] -> [B, N, P, D]
            return tensor.expand(rows.shape[0], -1, -1, -1) if tensor.shape[0] == 1 else tensor[rows]

        at = {}
        for site in injection.keys:
            if site not in among:
                continue
            for module, key, value in zip(
                self.modules[site], injection.keys[site], injection.values[site], strict=True
            ):
                at[id(module)] = spread(key), spread(value)
        with attend.injected(attend.Entering(at, injection.key_live[rows])):
            yield
