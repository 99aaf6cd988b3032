"""Random models, the same numbers for the same seed: what is timed does not depend on what was learned.

# B batch, P length, H hidden, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from incipit.backbones import Backbone, CausalBackbone, wrap
from incipit.backbones.tiny_tokenizer import build_tokenizer

POSITIONS = 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Shapes by name; "llama" has one key/value head a query head, as the prototype had.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden": 512, "layers": 8, "heads": 8, "ffn": 1408, "vocab": 32_000},
    "llama-1b": {"hidden": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "ffn": 8192, "vocab": 32_000},
    "llama-7b": {"hidden": 4096, "layers": 32, "heads": 32, "ffn": 11_008, "vocab": 32_000},
    "llama-curve": {"hidden": 256, "layers": 4, "heads": 4, "ffn": 704, "vocab": 8_000},
    "llama-toy": {"hidden": 32, "layers": 2, "heads": 4, "ffn": 48, "vocab": 320},
    "t5": {"hidden": 512, "layers": 6, "heads": 8, "ffn": 2048, "vocab": 32_128},
    "t5-1b": {"hidden": 1024, "layers": 24, "heads": 16, "ffn": 2816, "vocab": 32_128},
    "t5-toy": {"hidden": 32, "layers": 2, "heads": 4, "ffn": 48, "vocab": 320},
}


def make(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """(model, tokenizer) of settings shape, vocab (instead of the shape's), dtype, device and seed."""
    shape = SHAPES[settings["shape"]] | {k: settings[k] for k in ("vocab",) if k in settings}
    build = _t5 if settings["shape"].startswith("t5") else _llama
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[settings["dtype"]])
    try:
        with torch.random.fork_rng(devices=[]), torch.device(settings["device"]):
            torch.manual_seed(settings.get("seed", 0))
            model = build(shape)
    finally:
        torch.set_default_dtype(default)
    kind = "t5" if settings["shape"].startswith("t5") else "llama"
    return model.eval(), build_tokenizer(kind, POSITIONS)


def backbone(settings: Mapping[str, Any]) -> Backbone:
    """The model wrapped as a user's own model is."""
    model, tokenizer = make(settings)
    return wrap(settings["shape"], model, tokenizer)


def causal(settings: Mapping[str, Any]) -> CausalBackbone:
    """The same of a causal model."""
    found = backbone(settings)
    assert isinstance(found, CausalBackbone)
    return found


def soft_rows(settings: Mapping[str, Any], length: int, seed: int = 1) -> torch.Tensor:
    """A prompt's numbers [P, H] at the scale of the embeddings, float32."""
    hidden = SHAPES[settings["shape"]]["hidden"]
    scale = 1.0 if settings["shape"].startswith("t5") else 0.02
    return scale * torch.randn(length, hidden, generator=torch.Generator().manual_seed(seed))


def matrix_parameters(model: Any) -> int:
    """Parameters outside the embedding table and the output layer."""
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return sum(p.numel() for p in model.parameters() if id(p) not in ends)


def _llama(shape: Mapping[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocab"],
            hidden_size=shape["hidden"],
            intermediate_size=shape["ffn"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape.get("kv_heads", shape["heads"]),
            max_position_embeddings=POSITIONS,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _t5(shape: Mapping[str, Any]) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=shape["vocab"],
        d_model=shape["hidden"],
        d_kv=shape["hidden"] // shape["heads"],
        d_ff=shape["ffn"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        dropout_rate=0.0,  # PEFT trains in train(), where noise would hide whether the results are equal
        pad_token_id=0,
        eos_token_id=1,
    )
    config.update({"decoder_start_token_id": 0})
    return T5ForConditionalGeneration(config)
