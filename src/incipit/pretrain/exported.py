"""export/: an ordinary model folder, with a card that says what the model is and how it was made."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from incipit import files
from incipit.pretrain.settings import PretrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: PretrainSettings,
    folder: Path,
    step: int,
    tokens: int,
) -> None:
    """Write export/: bfloat16 safetensors, tokenizer, card and curve; whole or not at all."""
    curve = [r for r in files.read_jsonl(folder / "metrics.jsonl") if r["step"] <= step]
    with files.atomic_folder(folder / "export", overwrite=True) as part:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(part)  # type: ignore[arg-type]
        tokenizer.save_pretrained(str(part))
        files.atomic_write(part / "README.md", card(model, settings, curve, step, tokens))
        files.write_json(part / "curve.json", curve)


def card(
    model: nn.Module, settings: PretrainSettings, curve: Sequence[Mapping[str, Any]], step: int, tokens: int
) -> str:
    """What the model is, what it read, how it was trained, how well it predicts held-out text."""
    shape = f"hidden {settings.hidden}, {settings.layers} layers, {settings.heads} heads, FFN {settings.ffn}"
    weights = sum(p.numel() for p in model.parameters())
    recipe = asdict(settings) | {
        "corpus": [Path(p).name for p in settings.corpus],
        "validation": [Path(p).name for p in settings.validation],
        # a card names no place of one machine
        **{key: "/".join(Path(getattr(settings, key)).parts[-2:]) for key in ("start", "blocks")},
    }
    seen = step * settings.fit.batch * settings.context
    dev = [r for r in curve if "scores" in r]
    lines = [f"| {r['step']} | {r['scores']['nll']:.3f} | {r['scores']['perplexity']:.1f} |" for r in dev]
    return "\n".join(
        [
            f"# {settings.name}",
            "",
            f"A small {settings.family} language model of {weights:,} weights ({shape}), trained by incipit.",
            f"It read {seen:,} tokens ({step} of {settings.fit.steps} steps); the corpus has {tokens:,}.",
            "It is a backbone for trying prompt methods offline, not a source of facts.",
            *([settings.note] if settings.note else []),
            "",
            "## Held-out text",
            "",
            "| step | nll a token | perplexity |",
            "|---|---|---|",
            *lines,
            "",
            "## Recipe",
            "",
            "```toml",
            files.dump_toml({k: v for k, v in recipe.items() if k != "stages"}).rstrip(),
            "```",
            "",
            "Objectives by share of the run: "
            + "; ".join(f"from {s:g}: {dict(m)}" for s, m in settings.stages),
            "",
        ]
    )
