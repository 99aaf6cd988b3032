"""Prompts of several tasks that share a part: every task has its own numbers beside the shared ones.

# P length, H hidden, P_s + P_t = P, H_s + H_t = H, R rank
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from incipit.errors import PromptError, nearest
from incipit.injection import Geometry, Injection
from incipit.prompts.base import Prompt, check_length, check_rows, zero_rows
from incipit.prompts.inputs import InputPrompt

HOWS = ("add", "concat", "features", "project", "low_rank")


class MultitaskPrompt(Prompt):
    """P_k = combine(S, T_k): rows of task k from shared numbers S and its own T_k; each task's prompt holds both.

    add       S + T_k, both [P, H]
    concat    [S; T_k], S [P_s, H], T_k [P_t, H]; part = P_t
    features  [S, T_k], S [P, H_s], T_k [P, H_t]; part = H_t
    project   S W_k + b_k, S [P, H_s], W_k [H_s, H], b_k [H]; part = H_s
    low_rank  S * (u_k v_k), S [P, H], u_k [P, R], v_k [R, H]; part = R. Wang et al. 2023 (R = 1)
    The first four are those of the code of Lester et al. 2021 (extended/multitask_prompts.py there), which starts at
    random; here every task starts at the given rows (project: at their best approximation of rank H_s). `sibling`
    makes the next task's prompt, around the very same S. Raises PromptError for an unknown `how`, or a
    part out of range.
    """

    kind = "multitask"

    def __init__(
        self,
        geometry: Geometry,
        how: str,
        length: int,
        part: int = 0,
        rows: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if how not in HOWS:
            raise PromptError(f"unknown way {how!r} to combine shared and own numbers{nearest(how, HOWS)}")
        self.geometry, self.how, self.length = geometry, how, check_length(length, geometry)
        self.part = part or _DEFAULT_PART[how](length, geometry.hidden)
        most = {"add": 0, "concat": length - 1, "features": geometry.hidden - 1, "project": geometry.hidden,
                "low_rank": min(length, geometry.hidden)}[how]  # fmt: skip
        if not (how == "add" and not part) and not 1 <= self.part <= most:
            raise PromptError(
                f'part {part} of a "{how}" prompt of {length} rows of size {geometry.hidden}: '
                + ("it has none; leave it out" if how == "add" else f"give 1 to {most}")
            )
        start = torch.zeros(length, geometry.hidden) if rows is None else rows
        shared, own = self._parts(check_rows(start, length, geometry.hidden, "the start"), seed)
        self.shared = nn.Parameter(shared)
        self.own = nn.ParameterDict({name: nn.Parameter(value) for name, value in own.items()})

    def _parts(self, rows: Tensor, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """S and the own numbers whose combination is `rows` [P, H]."""
        p, h, part = self.length, self.geometry.hidden, self.part
        if self.how == "add":
            return rows, {"rows": torch.zeros(p, h)}
        if self.how == "concat":
            return rows[: p - part], {"rows": rows[p - part :].clone()}
        if self.how == "features":
            return rows[:, : h - part].clone(), {"rows": rows[:, h - part :].clone()}
        source = torch.Generator().manual_seed(seed)
        if self.how == "project":
            # rows = U S V: S carries the rows, W their directions; directions without rows are random
            _, _, basis = torch.linalg.svd(rows.double(), full_matrices=False)  # [min(P, H), H]
            random = torch.randn(part, h, generator=source, dtype=torch.float64)
            given = basis[: min(part, len(basis))] if bool(rows.any()) else basis[:0]
            kernel = torch.linalg.qr(torch.cat([given, random]).T).Q.T[:part]  # [H_s, H], orthonormal
            shared = rows.double() @ kernel.T  # [P, H_s]
            return shared.float(), {"kernel": kernel.float(), "bias": torch.zeros(h)}
        # u v = 1: the first rank is constant; the others start with v = 0, and a random u tells them apart
        left = torch.cat([torch.ones(p, 1), torch.randn(p, part - 1, generator=source)], dim=1)  # [P, R]
        right = torch.cat([torch.ones(1, h), torch.zeros(part - 1, h)])  # [R, H]
        return rows, {"left": left, "right": right}

    def rows(self) -> Tensor:
        """P_k [P, H]."""
        own: dict[str, Tensor] = dict(self.own)
        if self.how == "add":
            return self.shared + own["rows"]
        if self.how == "concat":
            return torch.cat([self.shared, own["rows"]])
        if self.how == "features":
            return torch.cat([self.shared, own["rows"]], dim=1)
        if self.how == "project":
            return self.shared @ own["kernel"] + own["bias"]
        return self.shared * (own["left"] @ own["right"])

    def sibling(self, seed: int = 0) -> MultitaskPrompt:
        """A prompt of another task at the same start: it holds the same S, so a step of either moves both."""
        made = MultitaskPrompt(
            self.geometry, self.how, self.length, self.part if self.how != "add" else 0,
            self.rows().detach().cpu(), seed,
        )  # fmt: skip
        if self.how in ("project", "low_rank"):  # their own numbers start where they fit this S
            made.own.load_state_dict({n: t.detach() for n, t in self.own.items()})
        made.shared = self.shared
        return made.to(self.shared.device)

    def injection(self) -> Injection:
        rows = self.rows()
        return Injection(rows=zero_rows().to(rows.device), inputs=rows[None])  # [1, P, H]

    def bake(self) -> Prompt:
        return InputPrompt(self.geometry, self.length, self.rows().detach().cpu()).to(self.shared.device)

    def units(self) -> dict[str, float]:
        rms = self.geometry.embedding_rms
        factors = ("kernel", "left", "right")  # of the order of 1, whatever the embeddings
        return {"shared": rms, **{f"own.{n}": 1.0 if n in factors else rms for n in self.own}}

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "how": self.how, "length": self.length, "part": self.part}


_DEFAULT_PART: dict[str, Callable[[int, int], int]] = {
    "add": lambda length, hidden: 0,
    "concat": lambda length, hidden: max(1, length // 2),
    "features": lambda length, hidden: hidden // 2,
    "project": lambda length, hidden: hidden,
    "low_rank": lambda length, hidden: 1,
}
