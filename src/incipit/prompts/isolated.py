"""What a prompt's rows see: of each other, and of the input. Without the input their states are computed once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from incipit.errors import PromptError
from incipit.injection import WITHIN, Geometry, Injection
from incipit.prompts.base import Prompt, prefixed


class Visibility(Prompt):
    """h = Enc([P; X]) where a row of P sees of P those before it ("before") or only itself ("itself"), and all of X.

    A mask of the code of Lester et al. 2021, who train with all seeing all ("all") and found that it matters little. It
    stands outside of a Framed prompt, so constant text around the rows belongs to the prompt. Raises PromptError where
    the backbone takes no such mask.
    """

    kind = "visibility"
    isolated: ClassVar[bool] = False

    def __init__(self, geometry: Geometry, inner: Prompt, within: str = "all") -> None:
        super().__init__()
        if within not in WITHIN:
            raise PromptError(f"a prompt row sees of its prompt one of {', '.join(WITHIN)}, got {within!r}")
        if not geometry.isolates:
            why = geometry.why_joint or "it was not found to"
            raise PromptError(
                f'this {geometry.family} backbone isolates no prompt: {why}; use prompt.attention = "joint"'
            )
        part = inner.injection()
        if part.behind is not None and self.isolated:
            raise PromptError(
                "an isolated prompt stands before the input; this layout puts rows behind it: write {input} last, "
                'or prompt.attention = "joint"'
            )
        if part.keys:
            raise PromptError(
                "keys and values never see the input, so a prefix prompt is not isolated: use an input prompt, "
                'or prompt.attention = "joint"'
            )
        self.geometry, self.inner, self.within, self.length = geometry, inner, within, inner.length

    def injection(self) -> Injection:
        return replace(self.inner.injection(), isolated=self.isolated, within=self.within)

    def around(self, inner: Prompt) -> Visibility:
        """Another prompt, seen alike."""
        return type(self)(self.geometry, inner, self.within)

    def bake(self) -> Prompt:
        baked = self.inner.bake()
        return self if baked is self.inner else self.around(baked)

    def units(self) -> dict[str, float]:
        return prefixed("inner", self.inner.units())

    def spec(self) -> dict[str, Any]:
        more = {} if self.within == "all" else {"within": self.within}
        return {"kind": self.kind, "inner": self.inner.spec()} | more


class Isolated(Visibility):
    """h_P = Enc(P), h_X = Enc(X | P), decoder reads [h_P; h_X]: an input prompt whose rows do not see the input X.

    Lester et al. 2021 train jointly, h = Enc([P; X]); their code has this mask as an option.
    """

    kind = "isolated"
    isolated = True


ATTENTIONS: dict[str, tuple[type[Visibility], str] | None] = {
    "joint": None,
    "isolated": (Isolated, "all"),
    "joint-causal": (Visibility, "before"),
    "joint-alone": (Visibility, "itself"),
    "isolated-causal": (Isolated, "before"),
    "isolated-alone": (Isolated, "itself"),
}
