"""Soft rows before the input tokens: the prompt of Lester et al. 2021."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from incipit.injection import Geometry, Injection
from incipit.prompts.base import RowPrompt, check_length, check_rows, zero_rows


class InputPrompt(RowPrompt):
    """[P; X]: P trained embeddings [P, H] before the embedded input X [T, H].

    Lester, Al-Rfou, Constant 2021, section 2. The learning-rate unit is the embedding RMS of the backbone.
    rows: the start [P, H], zeros without it. Raises PromptError for another shape, numbers that are not finite, and a
    length that leaves no room for text.
    """

    kind = "input"

    def __init__(self, geometry: Geometry, length: int, rows: Tensor | None = None) -> None:
        super().__init__()
        self.geometry = geometry
        self.length = check_length(length, geometry)
        start = torch.zeros(length, geometry.hidden) if rows is None else rows
        self.soft = nn.Parameter(check_rows(start, length, geometry.hidden, "the start"))  # [P, H]

    def rows(self) -> Tensor:
        return self.soft

    def place(self, rows: Tensor) -> Injection:
        return Injection(rows=zero_rows().to(rows.device), inputs=rows[None])  # [1, P, H]

    def set_rows(self, rows: Tensor) -> None:
        with torch.no_grad():
            self.soft.copy_(check_rows(rows, self.length, self.width, "the rows"))

    @property
    def width(self) -> int:
        return self.geometry.hidden

    @property
    def scale(self) -> float:
        return self.geometry.embedding_rms

    def units(self) -> dict[str, float]:
        return {"soft": self.geometry.embedding_rms}

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "length": self.length}
