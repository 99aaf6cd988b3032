"""Frozen models behind a few calls: causal, encoder-decoder and encoder, over Hugging Face."""

from incipit.backbones.base import Backbone, GenerateOptions
from incipit.backbones.causal import CausalBackbone
from incipit.backbones.encdec import EncoderDecoderBackbone
from incipit.backbones.encoder import EncoderBackbone
from incipit.backbones.load import load, wrap

__all__ = [
    "Backbone",
    "CausalBackbone",
    "EncoderBackbone",
    "EncoderDecoderBackbone",
    "GenerateOptions",
    "load",
    "wrap",
]
