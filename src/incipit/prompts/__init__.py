"""Trainable prompts. One method, one file; PROMPTS names the kinds, `build` makes one from its spec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from incipit.errors import PromptError, nearest
from incipit.injection import Geometry, Readout
from incipit.prompts.base import Prompt, RowPrompt
from incipit.prompts.framed import Embed, Framed, Reading, split_layout
from incipit.prompts.inputs import InputPrompt
from incipit.prompts.isolated import ATTENTIONS, Isolated, Visibility
from incipit.prompts.masked import Masked, mask_of
from incipit.prompts.multitask import MultitaskPrompt
from incipit.prompts.prefix import PrefixPrompt
from incipit.prompts.reparam import Reparametrised

__all__ = [
    "ATTENTIONS",
    "PROMPTS",
    "Framed",
    "InputPrompt",
    "Isolated",
    "Masked",
    "MultitaskPrompt",
    "PrefixPrompt",
    "Prompt",
    "Reading",
    "Reparametrised",
    "RowPrompt",
    "Visibility",
    "build",
    "split_layout",
]

PROMPTS: dict[str, type[Prompt]] = {
    "input": InputPrompt,
    "prefix": PrefixPrompt,
    "multitask": MultitaskPrompt,
    "reparametrised": Reparametrised,
    "masked": Masked,
    "framed": Framed,
    "isolated": Isolated,
    "visibility": Visibility,
    "reading": Reading,
}


def build(spec: Mapping[str, Any], geometry: Geometry, embed: Embed) -> Prompt:
    """Make an untrained prompt from `Prompt.spec()`; `embed` gives the constant rows of a Framed one.

    Raises PromptError for an unknown kind or a spec that lacks a part.
    """
    kind = spec.get("kind", "")
    if kind not in PROMPTS:
        raise PromptError(f"unknown prompt kind {kind!r}" + nearest(str(kind), PROMPTS))
    try:
        if kind == "input":
            return InputPrompt(geometry, spec["length"])
        if kind == "prefix":
            return PrefixPrompt(geometry, spec["length"], spec["sites"], scales=spec["scales"])
        if kind == "multitask":
            return MultitaskPrompt(geometry, spec["how"], spec["length"], spec["part"])
        inner = build(spec["inner"], geometry, embed) if spec["inner"] is not None else None
        if kind == "framed":
            return Framed(geometry, inner, spec["before"], spec["after"], embed, spec.get("behind", 0))
        if inner is None:
            raise PromptError(f"the spec of a {kind!r} prompt holds no inner prompt: it was damaged")
        if kind in ("isolated", "visibility"):
            seen = Isolated if kind == "isolated" else Visibility
            return seen(geometry, inner, spec.get("within", "all"))
        if kind == "reading":
            shape = (1, spec["classes"])
            readout = Readout(
                torch.zeros(*shape, spec["width"]),
                torch.zeros(shape),
                torch.ones(shape, dtype=torch.bool),
                spec["pool"],
                spec["cosine"],
                spec["scale"],
            )
            return Reading(inner, readout, spec["trained"])
        if not isinstance(inner, RowPrompt):
            raise PromptError(
                f"a {kind!r} prompt wraps an 'input' or 'prefix' prompt, its spec holds "
                f"{type(inner).__name__}: it was damaged"
            )
        if kind == "masked":
            return Masked(inner, mask_of(spec["mask"]), spec["removed"])
        return Reparametrised(inner, spec["net"], spec["hidden"], spec["seed"])
    except KeyError as error:
        raise PromptError(
            f"the spec of a {kind!r} prompt lacks {error}: it was written by another version"
        ) from error
