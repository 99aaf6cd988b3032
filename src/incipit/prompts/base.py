"""Prompt: a trainable module that yields an Injection of one prompt (K = 1).

# P length, W width of a row, H hidden, N key/value heads, D head dim
A prompt is its rows [P, W] and a placement: rows that enter at the input have W = H; rows that enter as keys
and values have W = the sum of their parts. A wrapper (Reparametrised, Framed) holds another prompt and adds
one thing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from incipit.errors import PromptError
from incipit.injection import Geometry, Injection


class Prompt(nn.Module, ABC):
    """Yields the Injection of one prompt; its parameters are all that is trained."""

    kind: str = ""
    length: int

    @abstractmethod
    def injection(self) -> Injection:
        """The Injection of this prompt, K = 1, rows = [0]; differentiable in the parameters."""

    @abstractmethod
    def units(self) -> dict[str, float]:
        """Learning-rate unit per parameter name: the size of the coordinates that it lives among."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """JSON-able description from which `build` makes an equal, untrained prompt."""

    def bake(self) -> Prompt:
        """The same function without training-time parts (default: itself)."""
        return self

    @property
    def trained_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


class RowPrompt(Prompt):
    """A prompt that is a table of rows [P, W]; `place` turns any such table into an Injection."""

    @abstractmethod
    def rows(self) -> Tensor:
        """The present rows [P, W]."""

    @abstractmethod
    def place(self, rows: Tensor) -> Injection:
        """Rows [P, W] -> Injection."""

    @abstractmethod
    def set_rows(self, rows: Tensor) -> None:
        """Overwrite the parameters by rows [P, W]."""

    @property
    @abstractmethod
    def width(self) -> int:
        """W."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """The unit of a row's coordinates, for the start of a reparametrisation."""

    def injection(self) -> Injection:
        return self.place(self.rows())


def zero_rows() -> Tensor:
    """rows [1] of a single prompt."""
    return torch.zeros(1, dtype=torch.int64)


def check_rows(rows: Tensor, length: int, width: int, what: str) -> Tensor:
    """Return rows as float32 [P, W]; raise PromptError for a wrong shape or numbers that are not finite."""
    if tuple(rows.shape) != (length, width):
        raise PromptError(
            f"{what} has shape {tuple(rows.shape)}, the prompt needs {(length, width)}: "
            "choose its length and backbone to fit"
        )
    if not bool(torch.isfinite(rows).all()):
        raise PromptError(f"{what} holds NaN or infinite numbers: it was damaged or its training diverged")
    return rows.detach().to(torch.float32).clone()


def check_length(length: int, geometry: Geometry) -> int:
    """Return length; raise PromptError when no text would fit beside it."""
    if length < 1:
        raise PromptError(f"prompt length {length}: it needs at least 1 row")
    if geometry.max_length and length >= geometry.max_length:
        raise PromptError(
            f"prompt length {length} leaves no room for text: the backbone has "
            f"{geometry.max_length} positions; choose fewer rows"
        )
    return length


def prefixed(name: str, units: Mapping[str, float]) -> dict[str, float]:
    """Units of an inner prompt, under the attribute name that holds it."""
    return {f"{name}.{key}": unit for key, unit in units.items()}
