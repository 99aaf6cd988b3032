"""W4: a decoding step of 64 rows behind one prompt of 200 or 1000 rows, against an expanded cache.

python -m benchmarks.w4_decoding [--device cuda]
The peer is what PEFT's prefix tuning hands to the model, and the fastest that transformers offers: a DynamicCache
expanded to all rows, prefilled once, in a bare greedy loop without `generate`. Seconds are those of one step, the
median time between two calls of the output layer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from benchmarks import ours, workload
from benchmarks.measure import Outcome, synchronise
from benchmarks.models import SHAPES, causal, make, soft_rows
from benchmarks.workload import Plan, Variant
from incipit.backbones import GenerateOptions
from incipit.batch import Encoded, collate

BASE: dict[str, Any] = {"dtype": "float32", "batch": 64, "text": 8, "new": 12, "passes": 2}
TARGETS = {1000: {"ratio": 10.0, "memory_ratio": 0.45}, 200: {"ratio": 3.3}}


def variants(plan: Plan) -> list[Variant]:
    """Two lengths of the prompt; on a GPU for two sizes in bfloat16."""
    sizes = [("1b", "llama-1b"), ("7b", "llama-7b")] if plan.kind == "cuda" else [("", "llama")]
    found = []
    for size, shape in sizes:
        for length, target in TARGETS.items():
            settings = BASE | {"shape": plan.shape(shape), "device": plan.device, "lengths": [length]}
            if size:
                settings["dtype"] = "bfloat16"
            if plan.toy:
                settings |= {"lengths": [length // 50], "batch": 3, "text": 3, "new": 3}
            name, title = f"{length}-rows", f"B = 64, P = {length}"
            found.append(
                Variant("w4", f"cuda-{size}-{name}" if size else name, f"{size}, {title}" if size else title,
                        settings, {} if size else target, tokens=step_tokens, asked=settings["batch"])
            )  # fmt: skip
    return found


def step_tokens(settings: Mapping[str, Any]) -> int:
    """Tokens that a step reads: one of every row."""
    return int(settings["batch"])


def asked(settings: Mapping[str, Any]) -> list[Encoded]:
    """Rows of equal length."""
    vocab, source = SHAPES[settings["shape"]]["vocab"], torch.Generator().manual_seed(0)
    ids = torch.randint(16, vocab, (settings["batch"], settings["text"]), generator=source)
    return [Encoded(tuple(row)) for row in ids.tolist()]


class Clock:
    """When the output layer was called."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.times: list[float] = []
        self.device = device
        model.get_output_embeddings().register_forward_hook(self._note)

    def _note(self, *_: object) -> None:
        synchronise(self.device)
        self.times.append(time.perf_counter())

    def step(self) -> float:
        """Median seconds between two calls."""
        gaps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        self.times.clear()
        return median(gaps)


class Ours:
    """`Backbone.generate` behind a prefilled prompt."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.backbone, self.new = causal(settings), settings["new"]
        self.batch = collate(asked(settings), pad_id=self.backbone.pad_id).to(self.backbone.device)
        with torch.no_grad():
            self.kept = self.backbone.prefill(ours.input_prompts(self.backbone, settings)[0].injection())
        self.kept = self.kept.with_rows(self.batch.rows)
        self.clock = Clock(self.backbone.model, self.backbone.device)

    def warm(self) -> None:
        """Two new tokens of two rows."""
        few = torch.arange(2, device=self.backbone.device)
        self.backbone.generate(self.batch.select(few), self.kept, GenerateOptions(max_new_tokens=2))
        self.clock.times.clear()

    def step(self) -> Outcome:
        """`new` tokens of every row."""
        ids = self.backbone.generate(self.batch, self.kept, GenerateOptions(max_new_tokens=self.new))
        return Outcome(ids=ids, seconds=self.clock.step())

    def first(self) -> torch.Tensor:
        """log p of the first new token [B, V]."""
        with torch.no_grad():
            return self.backbone.next_token(self.batch, self.kept)


class Peer:
    """The model with an expanded cache, greedy."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.model, _ = make(settings)
        self.device = torch.device(settings["device"])
        self.model.set_attn_implementation("sdpa")
        self.settings = {"attention": "sdpa", "cache": "DynamicCache, expanded", "loop": "bare"}
        self.ids = torch.tensor([e.input_ids for e in asked(settings)], device=self.device)  # [B, T]
        self.soft = soft_rows(settings, settings["lengths"][0]).to(self.device, self.model.dtype)
        self.new = settings["new"]
        self.clock = Clock(self.model, self.device)
        with torch.no_grad():
            self.prefix = self.model.base_model(inputs_embeds=self.soft[None], use_cache=True).past_key_values

    def warm(self) -> None:
        """Two new tokens of two rows."""
        self._greedy(self.ids[:2], 2)
        self.clock.times.clear()

    def step(self) -> Outcome:
        """`new` tokens of every row, cut at the end token as ours are."""
        tokens, _ = self._greedy(self.ids, self.new)
        rows = [row[: row.index(2)] if 2 in row else row for row in tokens.tolist()]
        return Outcome(ids=rows, seconds=self.clock.step())

    def first(self) -> torch.Tensor:
        """log p of the first new token [B, V]."""
        return self._greedy(self.ids, 1)[1].float().log_softmax(dim=-1)

    @torch.no_grad()
    def _greedy(self, ids: torch.Tensor, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """New ids [B, new] and the first logits [B, V]."""
        import copy

        cache = copy.deepcopy(self.prefix)
        cache.batch_repeat_interleave(len(ids))
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[
            :, -1
        ]
        first, found = logits, [logits.argmax(dim=-1)]
        for _ in range(new - 1):
            out = self.model(input_ids=found[-1][:, None], past_key_values=cache, use_cache=True)
            found.append(out.logits[:, -1].argmax(dim=-1))
        return torch.stack(found, dim=1), first


def check(settings: Mapping[str, Any], sides: Mapping[str, Any]) -> dict[str, float]:
    """The distribution over the first new token."""
    a, b = sides["ours"].first().double(), sides["peft"].first().double()
    return {"logits": float((a - b).norm() / b.norm())}


SIDES = {"ours": Ours, "peft": Peer}

if __name__ == "__main__":
    workload.main("benchmarks.w4_decoding", __doc__ or "")
