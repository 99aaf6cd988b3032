"""SST-2 for W6 and W7: the recipe of both sides, from files that the user has; in a toy a few made-up sentences."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from incipit import files
from incipit.recipe import Recipe

LABELS = {"0": "bad", "1": "good"}
ROWS = 66_676  # training rows that are left of 67,349 when one in a hundred is kept for validation


def recipe(data: str, backbone: str, more: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """Prompt tuning with 100 rows, batches of 32; `more` changes keys of prompt, train and so on."""
    tables: dict[str, dict[str, Any]] = {
        "backbone": {"name": backbone, "dtype": "float32"},
        "prompt": {"length": 100, "start": "label"},
        "task": {
            "name": "sst2", "kind": "classification", "input": "{sentence} it was", "labels": LABELS,
            "train": str(Path(data) / "train.jsonl.gz"), "test": str(Path(data) / "validation.jsonl.gz"),
            "split": {"validation": 0.01},
        },
        "train": {"batch": 32, "lr": 0.3, "schedule": "linear"},
    }  # fmt: skip
    return Recipe.of({"name": "sst2", **{k: v | dict(more.get(k, {})) for k, v in tables.items()}})


def toy(folder: Path) -> str:
    """Files of the same form with 200 and 20 sentences, of which the last word tells."""
    kinds = [("bad", "0"), ("poor", "0"), ("good", "1"), ("great", "1")]
    for name, count in (("train", 200), ("validation", 20)):
        lines = [{"sentence": f"a {'very ' * (i % 3)}{kinds[i % 4][0]} film", "label": int(kinds[i % 4][1])}
                 for i in range(count)]  # fmt: skip
        text = "\n".join(json.dumps(line) for line in lines)
        files.atomic_write(folder / f"{name}.jsonl.gz", gzip.compress(text.encode()))
    return str(folder)
