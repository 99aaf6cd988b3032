"""W3: eight prompts of 10 to 100 rows on one random Llama: trained at once, scored in one batch, as an ensemble.

python -m benchmarks.w3_many_prompts [--device cuda] [--only w3-trained]
PEFT has one active adapter: its side is a loop over `set_adapter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import ours, peer, rows, workload
from benchmarks.measure import Outcome
from benchmarks.models import SHAPES, causal
from benchmarks.workload import Plan, Variant
from incipit.batch import Encoded, collate
from incipit.decode import stacked

LENGTHS = [10, 22, 35, 48, 61, 74, 87, 100]
BASE: dict[str, Any] = {"dtype": "float32", "lengths": LENGTHS, "batch": 32, "mean": 27, "labels": 1}
LINES: list[tuple[str, str, dict[str, Any], dict[str, float]]] = [
    ("trained", "eight prompts trained at once, 32 rows a step", {"job": "train"}, {"ratio": 4}),
    ("scored", "32 rows of eight prompts scored in one batch, prefixes kept", {"job": "score"}, {"ratio": 6}),
    ("scored-anew", "the same, prefixes computed in the call", {"job": "score", "anew": True}, {}),
    ("ensemble", "32 rows x eight prompts as an ensemble, prefixes kept", {"job": "ensemble"}, {"ratio": 5}),
]  # fmt: skip


def variants(plan: Plan) -> list[Variant]:
    """The lines of the table; on a GPU two sizes in bfloat16."""
    sizes = [("1b", "llama-1b"), ("7b", "llama-7b")] if plan.kind == "cuda" else [("", "llama")]
    found = []
    for size, shape in sizes:
        for name, title, more, target in LINES:
            settings = BASE | more | {"shape": plan.shape(shape), "device": plan.device}
            if size:
                settings["dtype"] = "bfloat16"
            if plan.toy:
                settings |= {"lengths": [2, 3, 4, 5, 6, 7, 8, 9], "batch": 8, "mean": 6}
            training = more["job"] == "train"
            if not training:
                settings["passes"] = 2  # forward alone
            asked = {"train": 0, "score": 1, "ensemble": len(settings["lengths"])}[more["job"]] * settings[
                "batch"
            ]
            found.append(
                Variant("w3", f"cuda-{size}-{name}" if size else name, f"{size}, {title}" if size else title,
                        settings, {} if size else target, tokens=floor_tokens, asked=asked)
            )  # fmt: skip
    return found


def encoded(settings: Mapping[str, Any]) -> list[tuple[int, Encoded]]:
    """(prompt, row): the rows go round the prompts; in an ensemble every prompt reads every row."""
    vocab, prompts = SHAPES[settings["shape"]]["vocab"], len(settings["lengths"])
    if settings["job"] == "train":
        return [(i % prompts, e) for i, e in enumerate(rows.causal(settings, vocab))]
    asked = rows.asked(settings, vocab)
    if settings["job"] == "score":
        return [(i % prompts, e) for i, e in enumerate(asked)]
    return [(k, e) for k in range(prompts) for e in asked]


def floor_tokens(settings: Mapping[str, Any]) -> int:
    """All text tokens once, and all prompts once where they are not kept from before."""
    prompts = int(sum(settings["lengths"])) if settings["job"] == "train" or settings.get("anew") else 0
    return prompts + rows.tokens([e for _, e in encoded(settings)])


class Reading:
    """log p(next token) [B, V] of every row under its prompt; an ensemble is the mean of the probabilities."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings, self.backbone = settings, causal(settings)
        self.rows = encoded(settings)
        self.prompts = ours.input_prompts(self.backbone, settings)
        self.batch = collate(
            [e for _, e in self.rows], [k for k, _ in self.rows], pad_id=self.backbone.pad_id
        )
        self.batch = self.batch.to(self.backbone.device)
        with torch.no_grad():
            self.kept = None if settings.get("anew") else self.backbone.prefill(self._stack())

    def _stack(self) -> Any:
        return stacked(self.prompts, self.batch.rows)

    def warm(self) -> None:
        """A few rows."""
        with torch.no_grad():
            few = self.batch.select(torch.arange(2, device=self.batch.rows.device))
            self.backbone.next_token(few, stacked(self.prompts, few.rows))

    def step(self) -> Outcome:
        """All rows in one batch."""
        with torch.no_grad():
            logs = self.backbone.next_token(self.batch, self.kept if self.kept is not None else self._stack())
        return Outcome(logits=_together(logs, self.settings))


class PeerReading(peer.Peer):
    """The same by PEFT: each adapter reads its rows in turn."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings, inference=True)
        self.given, self.rows = settings, encoded(settings)

    def warm(self) -> None:
        """Choose the attention implementation on a few rows."""
        few = sorted(self.rows, key=lambda row: -len(row[1].input_ids))[:4]
        self.choose_attention(self.given, lambda: self._read(few))

    def step(self) -> Outcome:
        """One forward an adapter, without gradients."""
        return Outcome(logits=_together(self._read(self.rows), self.given))

    @torch.no_grad()
    def _read(self, asked: list[tuple[int, Encoded]]) -> torch.Tensor:
        found: dict[int, torch.Tensor] = {}
        for k in sorted({k for k, _ in asked}):
            self.use(k)
            index = [i for i, (j, _) in enumerate(asked) if j == k]
            given = peer.tensors([asked[i][1] for i in index], False, self.device)
            length = self.given["lengths"][k]
            logits = self.model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
            last = length + given["attention_mask"].sum(dim=1) - 1
            picked = logits[torch.arange(len(index), device=self.device), last]  # [B, V]
            found |= dict(zip(index, picked.float().log_softmax(dim=-1), strict=True))
        return torch.stack([found[i] for i in range(len(asked))])


def _together(logs: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
    """An ensemble's log mean probability [B, V]; otherwise the rows as they are."""
    if settings["job"] != "ensemble":
        return logs
    each = logs.unflatten(0, (len(settings["lengths"]), -1))  # [K, B, V]
    mean: torch.Tensor = each.logsumexp(dim=0) - torch.tensor(float(len(each))).log()
    return mean


def _ours(settings: Mapping[str, Any]) -> Any:
    return ours.Training(settings, encoded(settings)) if settings["job"] == "train" else Reading(settings)


def _peft(settings: Mapping[str, Any]) -> Any:
    return peer.Training(settings, encoded(settings)) if settings["job"] == "train" else PeerReading(settings)


SIDES = {"ours": _ours, "peft": _peft}

if __name__ == "__main__":
    workload.main("benchmarks.w3_many_prompts", __doc__ or "")
