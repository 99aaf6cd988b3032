"""Loading: a hub id, a local folder or `builtin:NAME` -> a frozen Backbone of the right family."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from incipit import files
from incipit.backbones import attend, builtin, internals
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
    sentinel: str = "",
) -> Backbone:
    """Load a frozen backbone.

    name: a Hugging Face id, a folder written by `save_pretrained`, or "builtin:minilm", "builtin:lm",
    "builtin:t5". dtype: float32, bfloat16, float16, float64, or "auto" (as stored; also for quantised
    weights). device: "cpu", "cuda", "cuda:1", "mps", or "auto". sentinel: see
    `Words.lead_with`. Raises BackboneError with the reason when the
    model cannot be had or cannot carry a prompt.
    """
    from transformers import AutoConfig, AutoTokenizer

    if dtype not in (*DTYPES, "auto"):
        raise BackboneError(f"unknown dtype {dtype!r}" + nearest(dtype, [*DTYPES, "auto"]))
    target = _device(device)
    place = builtin.locate(name) if name.startswith("builtin:") else _known(name)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_code}
    with attend.quiet():
        try:
            config = AutoConfig.from_pretrained(place, **source)
            tokenizer = AutoTokenizer.from_pretrained(place, **source)
            model, info = _model_class(config).from_pretrained(
                place,
                dtype=DTYPES.get(dtype, "auto"),
                output_loading_info=True,
                **internals.load_options(config, DTYPES.get(dtype)),
                **source,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            raise BackboneError(
                f"backbone {name!r} cannot be loaded: {_first_line(error)}; {_move(name)}"
            ) from error
    if absent := internals.lacking(info):
        raise BackboneError(
            f"the files of {name!r} lack {len(absent)} weights of a {type(model).__name__} "
            f"(first: {absent[0]}), which would be random numbers: choose a checkpoint of the whole model"
        )
    backbone = wrap(name, _placed(model, target, name), tokenizer)
    backbone.lead_with(sentinel)
    return backbone


def wrap(name: str, model: nn.Module, tokenizer: Any) -> Backbone:
    """A Backbone over a model and tokenizer that are loaded already."""
    kinds: dict[str, type[Backbone]] = {
        "causal": CausalBackbone,
        "encoder-decoder": EncoderDecoderBackbone,
        "encoder": EncoderBackbone,
    }
    kind = kinds[family_of(model.config)]
    try:
        return kind(name, model, tokenizer)
    except (TypeError, ValueError, AttributeError, IndexError, NotImplementedError) as error:
        raise BackboneError(
            f"backbone {name!r} ({type(model).__name__}) cannot carry a prompt: {_first_line(error)}; "
            "choose a model that takes embeddings in place of token ids"
        ) from error


def family_of(config: Any) -> str:
    """ "causal", "encoder-decoder" or "encoder", from a Hugging Face configuration; BackboneError for
    others."""
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


def _device(device: str) -> torch.device:
    """The device named; BackboneError for a name that torch does not know."""
    if device == "auto":
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        return torch.device(device)
    except RuntimeError as error:
        known = ("cpu", "cuda", "cuda:1", "mps", "auto")
        raise BackboneError(f"unknown device {device!r}" + nearest(device, known)) from error


def _placed(model: nn.Module, device: torch.device, name: str) -> nn.Module:
    if getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None):
        return model
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(
            f"backbone {name!r} cannot be put on device {str(device)!r}: {_first_line(error)}; "
            "use --set backbone.device=cpu, or a smaller dtype"
        ) from error


def _known(name: str) -> str:
    """The name, unless it looks like a folder that is not there: a hub would only say that the name is
    wrong."""
    if files.folder_files(name) is not None or not (name.startswith((".", "/", "~")) or name.count("/") > 1):
        return name
    raise BackboneError(
        f"there is no folder {name!r}: check the path, or give a Hugging Face id (owner/name)"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".;")


def _move(name: str) -> str:
    if name.startswith("builtin:") or files.folder_files(name) is not None:
        return "check that the folder holds config.json, the weights and the tokenizer"
    here = f"no folder of that name is in {os.getcwd()!r}"
    return f"{here}: check the path, or the id and the network; `builtin:minilm` works offline"
