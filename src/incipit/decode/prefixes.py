"""Prefixes: prompts as a frozen model reads them, computed once and kept while they fit.

# K prompts, P length, L layers, N key/value heads, D head dim
What a prompt makes of the model does not depend on the input wherever `Backbone.prefill` finds something to
compute; a kept prompt then costs its keys and values, 2 · L · N · P · D numbers, and no time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from incipit.backbones import Backbone, CausalBackbone
from incipit.batch import Encoded, collate
from incipit.injection import Injection
from incipit.prompts import Prompt

MAX_BYTES = 2**30


class Prefilled(Prompt):
    """The same prompt with its Injection computed already: to be read, not to be trained."""

    kind = "prefilled"

    def __init__(self, prompt: Prompt, injection: Injection) -> None:
        super().__init__()
        self.prompt, self.length, self.ready = prompt, prompt.length, injection

    def injection(self) -> Injection:
        return self.ready

    def units(self) -> dict[str, float]:
        return {}

    def spec(self) -> dict[str, Any]:
        return self.prompt.spec()

    def bake(self) -> Prompt:
        return self.prompt.bake()


@dataclass
class _Kept:
    """state: which numbers it was computed from. bytes: of its tensors."""

    state: tuple[tuple[int, int], ...]
    prefilled: Prefilled
    bytes: int


class Prefixes:
    """Prefilled prompts of one backbone, the least recently used dropped beyond `max_bytes`.

    A prompt whose numbers have changed since is computed anew. hits, misses: how often a prompt was there, or
    had to be computed. Not for several threads at once.
    """

    def __init__(self, backbone: Backbone, max_bytes: int = MAX_BYTES) -> None:
        self.backbone, self.max_bytes = backbone, max_bytes
        self.bytes = self.hits = self.misses = 0
        self._kept: OrderedDict[Prompt, _Kept] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._kept)

    def ready(self, prompts: Sequence[Prompt | None]) -> list[Prompt | None]:
        """The prompts, prefilled; all as they are where some would enter the model elsewhere than others."""
        found = [None if p is None else self._of(p) for p in prompts]
        ways = {(p.ready.inputs is None, frozenset(p.ready.keys)) for p in found if p is not None}
        return list(found) if len(ways) < 2 else list(prompts)

    def forget(self, prompt: Prompt) -> None:
        """Drop a prompt; nothing happens when it is not kept."""
        kept = self._kept.pop(prompt, None)
        self.bytes -= kept.bytes if kept else 0

    @torch.no_grad()
    def _of(self, prompt: Prompt) -> Prefilled:
        state = _state(prompt)
        kept = self._kept.get(prompt)
        if kept is not None and kept.state == state:
            self.hits += 1
            self._kept.move_to_end(prompt)
            return kept.prefilled
        self.misses += 1
        self.forget(prompt)
        prefilled = Prefilled(prompt, self._computed(prompt))
        kept = self._kept[prompt] = _Kept(state, prefilled, _size(prefilled.ready))
        self.bytes += kept.bytes
        while self.bytes > self.max_bytes:
            self.forget(next(iter(self._kept)))
        return prefilled

    def _computed(self, prompt: Prompt) -> Injection:
        one = collate([Encoded(())])  # a row to check the prompt against this model
        _, injection = self.backbone.at(one, prompt.injection())
        assert injection is not None
        if not injection.length or (isinstance(self.backbone, CausalBackbone) and not self.backbone.shares):
            return injection
        return self.backbone.prefill(injection)


def _state(prompt: Prompt) -> tuple[tuple[int, int], ...]:
    """Where the prompt's numbers are, and how often torch has seen them change."""
    tensors = (*prompt.parameters(), *prompt.buffers())
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


def _size(injection: Injection) -> int:
    parts = [
        injection.inputs,
        *(t for at in (injection.keys, injection.values) for ts in at.values() for t in ts),
    ]
    return sum(t.numel() * t.element_size() for t in parts if t is not None)
