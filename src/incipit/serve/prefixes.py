"""Prompts as the model reads them: computed once a version, kept while they fit, never dropped while they are read.

# K = 1, P length, L layers, N key/value heads, D head dim
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from incipit.backbones import Backbone, CausalBackbone
from incipit.backbones.memory import total
from incipit.batch import Encoded, collate
from incipit.errors import ArtifactError, IncipitError
from incipit.injection import Injection
from incipit.serve.executor import CacheUse

LEAST = 2**28  # bytes that prompts may take on the smallest machine
SHARE = 16  # of the device's memory they may take one in so many


@dataclass
class _Kept:
    injection: Injection
    bytes: int
    readers: int = 0


class Prefixes:
    """Version id -> its Injection on the model's device, prefilled where the model shares prefixes.

    The least recently used are dropped beyond `max_bytes` (0: a share of the device's memory), those that rows read
    excepted. For one thread.
    """

    def __init__(self, backbone: Backbone, max_bytes: int = 0) -> None:
        self.backbone = backbone
        self.max_bytes = max_bytes or max(LEAST, total(backbone.device) // SHARE)
        self.bytes = self.hits = self.misses = 0
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def take(self, version: Any) -> Injection:
        """The prompt of a version, held until `give`. Raises IncipitError for one that this model cannot read."""
        kept = self._kept.get(version.id)
        if kept is None:
            self.misses += 1
            injection = self._computed(version)
            kept = self._kept[version.id] = _Kept(injection, _size(injection))
            self.bytes += kept.bytes
        else:
            self.hits += 1
            self._kept.move_to_end(version.id)
        kept.readers += 1
        self._shrink()
        return kept.injection

    def give(self, name: str) -> None:
        """One reader of a version is done."""
        self._kept[name].readers -= 1
        self._shrink()

    def use(self) -> CacheUse:
        """Counters."""
        return CacheUse(self.hits, self.misses, len(self._kept), self.bytes, self.max_bytes)

    def _shrink(self) -> None:
        if self.bytes <= self.max_bytes:
            return
        for name in [n for n, kept in self._kept.items() if not kept.readers]:
            self.bytes -= self._kept.pop(name).bytes
            if self.bytes <= self.max_bytes:
                return

    @torch.no_grad()
    def _computed(self, version: Any) -> Injection:
        try:
            there = self._prefilled(version.prompt(self.backbone).injection())
        except IncipitError:
            raise
        except Exception as error:  # too large for the memory that is left, for example: nobody else's fault
            raise ArtifactError(
                f"prompt {version.name!r} cannot be computed on backbone {self.backbone.name!r} "
                f"({type(error).__name__}): use another version, or a smaller one"
            ) from error
        parts = [t for at in (there.keys, there.values) for ts in at.values() for t in ts]
        if not all(bool(torch.isfinite(t).all()) for t in parts):
            raise ArtifactError(
                f"prompt {version.name!r} makes numbers that are not finite of backbone {self.backbone.name!r}: it was "
                "trained astray; use another version"
            )
        return there

    def _prefilled(self, injection: Injection) -> Injection:
        """On the model's device, checked against its shapes, and as keys and values where these can be shared."""
        _, there = self.backbone.at(collate([Encoded(())]), injection)
        assert there is not None
        if there.length and not (isinstance(self.backbone, CausalBackbone) and not self.backbone.shares):
            return self.backbone.prefill(there)
        return there


def _size(injection: Injection) -> int:
    parts = [
        injection.inputs,
        *(t for at in (injection.keys, injection.values) for ts in at.values() for t in ts),
    ]
    return sum(t.numel() * t.element_size() for t in parts if t is not None)
