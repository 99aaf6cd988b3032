"""Our side of a workload: the calls that the training loop and the decoder make, on random rows.

# B batch, K prompts, P length, H hidden
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.measure import Outcome
from benchmarks.models import backbone, soft_rows
from incipit.backbones import Backbone
from incipit.batch import Batch, Encoded, collate
from incipit.prompts import InputPrompt, Prompt
from incipit.run.parts import objective, passes
from incipit.train.gradients import Parts, accumulate


class Training:
    """One step of `incipit.train.fit` without the optimiser: `accumulate` over the rows of all trainees."""

    def __init__(self, settings: Mapping[str, Any], rows: Sequence[tuple[int, Encoded]]) -> None:
        self.backbone: Backbone = backbone(settings)
        self.rows, self.accelerator = list(rows), Accelerator(cpu=settings["device"] == "cpu")
        self.prompts = input_prompts(self.backbone, settings)
        self.carried: Sequence[Prompt] = (
            self.prompts
        )  # what enters the model: the prompts, or wrappers of them
        self.parts = passes(self.backbone, self.carried, 0.0, "float32")

    def step(self) -> Outcome:
        """Forward and backward of all rows."""
        return self._step(self.rows)

    def warm(self) -> None:
        """The same on a few rows."""
        self._step(self.rows[:2])

    def _step(self, rows: Sequence[tuple[int, Encoded]]) -> Outcome:
        for prompt in self.prompts:
            prompt.zero_grad(set_to_none=True)
        sums = accumulate(
            rows, len(self.prompts), objective(self.backbone, self.carried), self._collate, self.accelerator,
            self.backbone.device, parts=Parts(**self.parts), precision="float32", asked=False,
        )  # fmt: skip
        count = max(1.0, sum(sums.count))
        zero = torch.zeros(0, self.backbone.geometry.hidden, device=self.backbone.device)
        grads = [p.soft.grad / count if p.soft.grad is not None else zero for p in self.prompts]
        return Outcome(loss=sum(sums.nll) / count, gradient=torch.cat(grads))

    def _collate(self, encoded: Sequence[Encoded], rows: Sequence[int]) -> Batch:
        return collate(encoded, rows, pad_id=self.backbone.pad_id)


def input_prompts(own: Backbone, settings: Mapping[str, Any]) -> list[InputPrompt]:
    """One prompt for each of settings["lengths"]; prompt k has the seed k + 1, on both sides."""
    return [
        InputPrompt(own.geometry, n, rows=soft_rows(settings, n, k + 1)).to(own.device)
        for k, n in enumerate(settings["lengths"])
    ]
