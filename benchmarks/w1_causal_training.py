"""W1: one training step (forward and backward) of prompt tuning on a random Llama.

python -m benchmarks.w1_causal_training [--device cuda] [--only w1-bfloat16]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import ours, peer, rows, workload
from benchmarks.models import SHAPES
from benchmarks.workload import Plan, Variant
from incipit.batch import Encoded

BASE: dict[str, Any] = {"dtype": "float32", "lengths": [100], "batch": 32, "mean": 27, "labels": 1}
# name, title, what differs from BASE, target
LINES: list[tuple[str, str, dict[str, Any], dict[str, float]]] = [
    ("float32", "float32, P = 100, B = 32, one label a row", {},
     {"ratio": 11, "memory_ratio": 1 / 9, "floor_ratio": 1.2}),
    ("bfloat16", "bfloat16", {"dtype": "bfloat16"}, {"ratio": 10}),
    ("every-token", "every token labelled", {"labels": 0}, {"ratio": 8}),
    ("short-prompt", "P = 20, the last 8 tokens labelled", {"lengths": [20], "labels": 8}, {"ratio": 5}),
    ("long-inputs", "inputs of mean 92, B = 8", {"batch": 8, "mean": 92}, {"ratio": 3.3}),
    ("large-vocabulary", "V = 128,256, B = 8", {"batch": 8, "vocab": 128_256}, {"ratio": 15}),
]  # fmt: skip


def variants(plan: Plan) -> list[Variant]:
    """The six lines of the table; on a GPU two sizes in bfloat16."""
    if plan.kind == "cuda":
        return [
            _variant(plan, f"{size}-{name}", f"{size}, {title}", f"llama-{size}", more | {"dtype": "bfloat16"},
                     {"ratio": 5, "floor_ratio": 2.5} if name == "float32" else {})
            for size in ("1b", "7b")
            for name, title, more, _ in LINES
            if name != "bfloat16"
        ]  # fmt: skip
    return [_variant(plan, name, title, "llama", more, target) for name, title, more, target in LINES]


def _variant(
    plan: Plan, name: str, title: str, shape: str, more: dict[str, Any], target: dict[str, float]
) -> Variant:
    if plan.kind == "cuda":
        name, title = "cuda-" + name.replace("float32", "base"), title.replace("float32", "bfloat16")
    settings = {**BASE, **more, "shape": plan.shape(shape), "device": plan.device}
    if plan.toy:
        settings |= {"lengths": [min(n, 8) for n in settings["lengths"]], "batch": 4, "mean": 6}
        settings.pop("vocab", None)
    return Variant("w1", name, title, settings, target, tokens=floor_tokens)


def encoded(settings: Mapping[str, Any]) -> list[tuple[int, Encoded]]:
    """The rows of the step; row i belongs to prompt i mod K."""
    vocab = settings.get("vocab", SHAPES[settings["shape"]]["vocab"])
    prompts = len(settings["lengths"])
    return [(i % prompts, e) for i, e in enumerate(rows.causal(settings, vocab))]


def floor_tokens(settings: Mapping[str, Any]) -> int:
    """P + the sum of the lengths: each prompt once, each text token once."""
    return int(sum(settings["lengths"])) + rows.tokens([e for _, e in encoded(settings)])


SIDES = {
    "ours": lambda settings: ours.Training(settings, encoded(settings)),
    "peft": lambda settings: peer.Training(settings, encoded(settings)),
}

if __name__ == "__main__":
    workload.main("benchmarks.w1_causal_training", __doc__ or "")
