"""W5: `generate` of 32 rows of mixed lengths behind a prompt of 100: 16 new tokens greedy, 8 with four beams.

python -m benchmarks.w5_generate [--device cuda]
PEFT's `generate` puts the prompt before the padding of a left-padded batch, so there the answer of a short row
depends on its neighbours; whether both write the same is checked on rows of one length.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import measure, ours, peer, rows, workload
from benchmarks.measure import Outcome
from benchmarks.models import SHAPES, backbone
from benchmarks.workload import Plan, Variant
from incipit.backbones import GenerateOptions
from incipit.batch import Encoded, collate, pad
from incipit.decode import stacked

BASE: dict[str, Any] = {"dtype": "float32", "lengths": [100], "batch": 32, "mean": 27}
LINES: list[tuple[str, str, dict[str, Any], dict[str, float]]] = [
    ("greedy", "B = 32, P = 100, 16 new tokens", {"new": 16, "beams": 1}, {"ratio": 2.5}),
    ("beams", "8 new tokens with 4 beams", {"new": 8, "beams": 4}, {"ratio": 3}),
]
END = 2  # the end token of the tokenizer and of the model's configuration


def variants(plan: Plan) -> list[Variant]:
    """Greedy and beams; on a GPU for two sizes in bfloat16."""
    sizes = [("1b", "llama-1b"), ("7b", "llama-7b")] if plan.kind == "cuda" else [("", "llama")]
    found = []
    for size, shape in sizes:
        for name, title, more, target in LINES:
            settings = BASE | more | {"shape": plan.shape(shape), "device": plan.device}
            if size:
                settings["dtype"] = "bfloat16"
            if plan.toy:
                settings |= {"lengths": [6], "batch": 3, "mean": 6, "new": 3}
            found.append(
                Variant("w5", f"cuda-{size}-{name}" if size else name, f"{size}, {title}" if size else title,
                        settings, {} if size else target)
            )  # fmt: skip
    return found


def asked(settings: Mapping[str, Any]) -> list[Encoded]:
    """The rows to be answered."""
    return rows.asked(settings, SHAPES[settings["shape"]]["vocab"])


def even(settings: Mapping[str, Any]) -> list[Encoded]:
    """A few rows, cut to one length."""
    few = asked(settings)[:8]
    least = min(len(e.input_ids) for e in few)
    return [Encoded(e.input_ids[:least]) for e in few]


class Ours:
    """`Backbone.generate`, the prompt given as it was trained."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.backbone, self.rows = backbone(settings), asked(settings)
        self.prompts = ours.input_prompts(self.backbone, settings)
        self.options = GenerateOptions(max_new_tokens=settings["new"], beams=settings["beams"])

    def warm(self) -> None:
        """Two rows."""
        self.write(self.rows[:2])

    def step(self) -> Outcome:
        """New ids of all rows; not compared, see the head of this file."""
        self.write(self.rows)
        return Outcome()

    def write(self, encoded: list[Encoded]) -> list[list[int]]:
        """New ids per row."""
        batch = collate(encoded, pad_id=self.backbone.pad_id).to(self.backbone.device)
        with torch.no_grad():
            return self.backbone.generate(batch, stacked(self.prompts, batch.rows), self.options)


class Peer(peer.Peer):
    """PEFT's own `generate`, with cache."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings, inference=True)
        self.given, self.rows = settings, asked(settings)

    def warm(self) -> None:
        """Choose the attention implementation on a few rows."""
        self.choose_attention(self.given, lambda: self.write(self.rows[:2]))

    def step(self) -> Outcome:
        """New ids of all rows."""
        self.write(self.rows)
        return Outcome()

    @torch.no_grad()
    def write(self, encoded: list[Encoded]) -> list[list[int]]:
        """New ids per row, cut at the end token."""
        ids, mask = pad([e.input_ids for e in encoded], 0, "left")
        with (
            warnings.catch_warnings()
        ):  # transformers 5.23 gives PEFT positions, which PEFT 0.21.2 drops and says so
            warnings.filterwarnings("ignore", "Position ids are not supported", UserWarning)
            out = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.long().to(self.device),
                max_new_tokens=self.given["new"],
                num_beams=self.given["beams"],
                do_sample=False,
                use_cache=True,
            )
        new = out[:, ids.shape[1] :].tolist()
        return [row[: row.index(END)] if END in row else row for row in new]


def check(settings: Mapping[str, Any], sides: Mapping[str, Any]) -> dict[str, float]:
    """What both write to rows of one length."""
    few = even(settings)
    return measure.differences(Outcome(ids=sides["ours"].write(few)), Outcome(ids=sides["peft"].write(few)))


SIDES = {"ours": Ours, "peft": Peer}

if __name__ == "__main__":
    workload.main("benchmarks.w5_generate", __doc__ or "")
