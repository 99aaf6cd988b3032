"""Loading: a hub id, a local folder or `builtin:NAME` -> a frozen Backbone of the right family."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from incipit.backbones import attend, builtin
from incipit.backbones.base import Backbone
from incipit.backbones.causal import CausalBackbone
from incipit.backbones.encdec import EncoderDecoderBackbone
from incipit.backbones.encoder import EncoderBackbone
from incipit.errors import BackboneError, nearest

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def load(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    trust_code: bool = False,
) -> Backbone:
    """Load a frozen backbone.

    name: a Hugging Face id, a folder written by `save_pretrained`, or "builtin:minilm", "builtin:lm", "builtin:t5".
    dtype: float32, bfloat16, float16, float64, or "auto" (as stored; also for quantised weights). device: "cpu",
    "cuda", "cuda:1", "mps", or "auto". Raises BackboneError with the reason when the model cannot be had or cannot
    carry a prompt.
    """
    from transformers import AutoConfig, AutoTokenizer

    if dtype not in (*DTYPES, "auto"):
        raise BackboneError(f"unknown dtype {dtype!r}" + nearest(dtype, [*DTYPES, "auto"]))
    place = builtin.locate(name) if name.startswith("builtin:") else name
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_code}
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(place, **source)
            tokenizer = AutoTokenizer.from_pretrained(place, **source)
            model = _model_class(config).from_pretrained(
                place, dtype=DTYPES.get(dtype, "auto"), **attend.load_options(config), **source
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise BackboneError(
                f"backbone {name!r} cannot be loaded: {_first_line(error)}; {_move(name)}"
            ) from error
    return wrap(name, _placed(model, device, name), tokenizer)


def wrap(name: str, model: nn.Module, tokenizer: Any) -> Backbone:
    """A Backbone over a model and tokenizer that are loaded already."""
    family = family_of(model.config)
    kinds: dict[str, type[Backbone]] = {
        "causal": CausalBackbone,
        "encoder-decoder": EncoderDecoderBackbone,
        "encoder": EncoderBackbone,
    }
    backbone = kinds[family](name, model, tokenizer)
    rows = backbone.geometry.vocab
    if len(tokenizer) > rows:
        raise BackboneError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens, the model {rows} embeddings: "
            "they belong to different models"
        )
    return backbone


def family_of(config: Any) -> str:
    """ "causal", "encoder-decoder" or "encoder", from a Hugging Face configuration; BackboneError for others."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    kind = type(config)
    if getattr(config, "is_encoder_decoder", False) and kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return "encoder-decoder"
    if kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return "encoder"
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "causal"
    raise BackboneError(
        f"models of type {config.model_type!r} are neither causal, encoder-decoder nor masked language "
        "models: choose a text model"
    )


def _model_class(config: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    family = family_of(config)
    if family == "encoder":
        masked = any("MaskedLM" in a or "PreTraining" in a for a in config.architectures or ())
        return AutoModelForMaskedLM if masked else AutoModel
    return AutoModelForSeq2SeqLM if family == "encoder-decoder" else AutoModelForCausalLM


def _placed(model: nn.Module, device: str, name: str) -> nn.Module:
    if getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None):
        return model
    if device == "auto":
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(
            f"backbone {name!r} cannot be put on device {device!r}: {_first_line(error)}; "
            "use --set backbone.device=cpu, or a smaller dtype"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".;")


def _move(name: str) -> str:
    if name.startswith("builtin:") or Path(name).is_dir():
        return "check that the folder holds config.json, the weights and the tokenizer"
    return "check the id and the network, or give a local folder; `builtin:minilm` works offline"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loading bars and advice of the model library stay off the user's screen."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
