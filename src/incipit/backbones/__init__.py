"""Frozen models behind a few calls: causal, encoder-decoder and encoder, over Hugging Face."""

from incipit.backbones.base import Backbone
from incipit.backbones.causal import CausalBackbone
from incipit.backbones.decoding import GenerateOptions
from incipit.backbones.encdec import EncoderDecoderBackbone
from incipit.backbones.encoder import EncoderBackbone
from incipit.backbones.hardware import autocast, fastest_dtype
from incipit.backbones.load import load, wrap

__all__ = [
    "Backbone",
    "CausalBackbone",
    "EncoderBackbone",
    "EncoderDecoderBackbone",
    "GenerateOptions",
    "autocast",
    "fastest_dtype",
    "load",
    "wrap",
]
