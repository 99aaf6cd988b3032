"""Backbones whose attention takes keys and values directly (encoder, decoder and cross sites)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from incipit.backbones import attend
from incipit.backbones.base import Backbone
from incipit.errors import BackboneError
from incipit.injection import SITES, Injection


class SiteBackbone(Backbone):
    """modules: site -> the attention modules of its layers, in order; found by running the model once."""

    modules: dict[str, list[nn.Module]]

    def _find_sites(
        self, run: Callable[[], object], encoder: nn.Module | None, cross_length: int = -1
    ) -> None:
        self.modules = {}
        if not attend.use_interface(self.model):
            return
        found = attend.probe_sites(self.model, run, encoder, cross_length)
        self.modules = {site: [m for m, _ in found[site]] for site in SITES if site in found}
        shapes = {site: tuple(shape for _, shape in found[site]) for site in self.modules}
        self.geometry = replace(self.geometry, sites=shapes)

    @contextmanager
    def entering(self, injection: Injection | None, among: Sequence[str] = SITES) -> Iterator[None]:
        """Within the block, attention sees the injection's keys and values at the sites `among`."""
        if injection is None or not injection.keys:
            yield
            return
        missing = [s for s in injection.keys if s not in self.modules]
        if missing:
            raise BackboneError(
                f"backbone {self.name!r} takes no keys and values at {', '.join(missing)}: its attention does not go "
                "through the attention interface; use an input prompt"
            )
        assert injection.key_live is not None
        at = {}
        for site in injection.keys:
            if site not in among:
                continue
            if len(injection.keys[site]) != len(self.modules[site]):
                raise BackboneError(
                    f"the prefix has {len(injection.keys[site])} layers at {site}, backbone "
                    f"{self.name!r} has {len(self.modules[site])}: it belongs to another model"
                )
            for module, key, value in zip(
                self.modules[site], injection.keys[site], injection.values[site], strict=True
            ):
                rows = injection.rows
                shared = key.shape[0] == 1
                at[id(module)] = (
                    key.expand(rows.shape[0], -1, -1, -1) if shared else key[rows],
                    value.expand(rows.shape[0], -1, -1, -1) if shared else value[rows],
                )
        with attend.injected(attend.Entering(at, injection.key_live[injection.rows])):
            yield
