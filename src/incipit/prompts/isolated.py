"""The input sees the prompt, the prompt sees only itself: its states are computed once for all inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from incipit.errors import PromptError
from incipit.injection import Geometry, Injection
from incipit.prompts.base import Prompt, prefixed


class Isolated(Prompt):
    """h_P = Enc(P), h_X = Enc(X | P), decoder reads [h_P; h_X]: an input prompt whose rows do not see the input X.

    Lester et al. 2021 train jointly, h = Enc([P; X]); their code has this mask as an option. It stands outside of
    a Framed prompt, so constant text around the rows belongs to the prompt.
    """

    kind = "isolated"

    def __init__(self, geometry: Geometry, inner: Prompt) -> None:
        super().__init__()
        if not geometry.isolates:
            why = geometry.why_joint or "it was not found to"
            raise PromptError(
                f'this {geometry.family} backbone isolates no prompt: {why}; use prompt.attention = "joint"'
            )
        if inner.injection().keys:
            raise PromptError(
                "keys and values never see the input, so a prefix prompt is not isolated: use an input prompt, "
                'or prompt.attention = "joint"'
            )
        self.geometry, self.inner, self.length = geometry, inner, inner.length

    def injection(self) -> Injection:
        return replace(self.inner.injection(), isolated=True)

    def around(self, inner: Prompt) -> Isolated:
        """Another prompt, isolated."""
        return Isolated(self.geometry, inner)

    def bake(self) -> Prompt:
        baked = self.inner.bake()
        return self if baked is self.inner else self.around(baked)

    def units(self) -> dict[str, float]:
        return prefixed("inner", self.inner.units())

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "inner": self.inner.spec()}
