"""W x + B A x (LoRA) and l * (W x) (IA3): adapters inside a frozen model, by PEFT, on the loop that trains prompts.

Hu et al. 2021, section 4; Liu et al. 2022, section 3.3. What a prompt is compared with: their numbers, bytes and scores
are put on record, the adapters themselves are not kept (PEFT keeps its own).
"""

from __future__ import annotations

from typing import Any

import torch

from incipit.errors import RecipeError


def adapt(model: Any, method: str, rank: int, seed: int) -> None:
    """Put adapters into the layers of `model`, in place; only they are trained. method: "lora" or "ia3".

    Raises RecipeError without peft, and for a model whose layers PEFT has no standard choice for.
    """
    try:
        from peft import IA3Config, LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise RecipeError(f'train.method = "{method}" needs peft: pip install peft') from error
    torch.manual_seed(seed)  # the start of A
    settings: Any = LoraConfig(r=rank, lora_alpha=2 * rank) if method == "lora" else IA3Config()
    try:
        inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise RecipeError(
            f'train.method = "{method}": PEFT has no layers to adapt in a {type(model).__name__} ({error}); '
            'use method = "prompt" or "model"'
        ) from error
