"""The untrained model of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from incipit.pretrain.settings import PretrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build(settings: PretrainSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The untrained model, in float32, seeded."""
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(settings.seed)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if settings.family == "causal":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=settings.hidden,
                intermediate_size=settings.ffn,
                num_hidden_layers=settings.layers,
                num_attention_heads=settings.heads,
                num_key_value_heads=settings.kv_heads,
                max_position_embeddings=settings.positions,
                tie_word_embeddings=settings.tied,
                bos_token_id=tokenizer.bos_token_id,
                initializer_range=0.02,
                **ids,
            )
        )
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=settings.hidden,
        d_kv=settings.hidden // settings.heads,
        d_ff=settings.ffn,
        num_layers=settings.layers,
        num_decoder_layers=settings.layers,
        num_heads=settings.heads,
        feed_forward_proj=f"gated-{settings.activation}",
        dropout_rate=0.0,
        **ids,
    )
    more = {"decoder_start_token_id": tokenizer.pad_token_id, "n_positions": settings.positions}
    config.update(more)
    return T5ForConditionalGeneration(config)
