"""A network between trained numbers and the prompt; it helps training and is dropped afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from incipit.errors import PromptError
from incipit.injection import Injection
from incipit.prompts.base import Prompt, RowPrompt, prefixed

NETS = ("mlp", "lstm")


class Reparametrised(Prompt):
    """P' = P0 + s * MLP(E): rows made by a network from source embeddings E [P, E], dropped after training.

    "mlp": two layers with tanh, Li and Liang 2021, section 4.3. "lstm": a bidirectional LSTM, then two layers
    with ReLU, Liu et al. 2021 (P-tuning), section 3. The last layer starts at zero, so training starts
    exactly at the start P0 of the inner prompt (the papers start at random); s is the unit of the inner rows,
    which are trained too; E and the network have the unit 1.
    """

    kind = "reparametrised"

    def __init__(self, inner: RowPrompt, net: str = "mlp", hidden: int = 128, seed: int = 0) -> None:
        super().__init__()
        if net not in NETS:
            raise PromptError(f"unknown reparametrisation {net!r}: use one of {', '.join(NETS)}")
        self.inner = inner
        self.length = inner.length
        self.net, self.hidden, self.seed = net, hidden, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.source = nn.Parameter(torch.randn(inner.length, hidden))  # [P, E]
            self.lstm = (
                nn.LSTM(hidden, hidden // 2, bidirectional=True, batch_first=True) if net == "lstm" else None
            )
            activation = nn.Tanh() if net == "mlp" else nn.ReLU()
            last = nn.Linear(hidden, inner.width)
            self.layers = nn.Sequential(nn.Linear(hidden, hidden), activation, last)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def rows(self) -> Tensor:
        """The rows [P, W] that the network gives now."""
        source = self.source if self.lstm is None else self.lstm(self.source[None])[0][0]  # [P, E]
        made: Tensor = self.layers(source)
        return self.inner.rows() + self.inner.scale * made

    def injection(self) -> Injection:
        return self.inner.place(self.rows())

    def bake(self) -> Prompt:
        spec = self.inner.spec()
        assert spec["kind"] == self.inner.kind
        baked = _copy(self.inner)
        baked.set_rows(self.rows().detach())
        return baked

    def units(self) -> dict[str, float]:
        own = {name: 1.0 for name, _ in self.named_parameters() if not name.startswith("inner.")}
        return {**own, **prefixed("inner", self.inner.units())}

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "net": self.net,
            "hidden": self.hidden,
            "seed": self.seed,
            "inner": self.inner.spec(),
        }


def _copy(prompt: RowPrompt) -> RowPrompt:
    import copy

    return copy.deepcopy(prompt)
