"""Random models of every supported family, built in about 20 ms each: all contracts are tested on them.

Each has the traits in which real families differ and prompts go wrong: fewer key/value than query heads, a
head size other than hidden / heads, windows shorter than a prompt, encoder and decoder of different depth, a
padding id other than 0, no padding id at all, an output layer that is scaled, capped or biased. All dropouts
are on, and `build` returns the model as its constructor does, in train(): who forgets eval() sees noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from incipit.backbones.tiny_tokenizer import build_tokenizer
from incipit.errors import BackboneError, nearest
from incipit.files import atomic_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Family = Literal["causal", "encoder-decoder", "encoder", "recurrent"]

# Standard deviations of the random weights. With 32 inputs a matrix of 0.2 keeps the scale of what it reads
# (0.2 · √32 = 1.1), so every layer matters and no softmax saturates.
MATRIX, VECTOR = 0.2, 0.1


@dataclass(frozen=True)
class Builder:
    """What one tiny model is made of: names and numbers only, so that reading the dict costs no import.

    family    "recurrent" models have layers without keys and values: they are here to be refused
    model     class in transformers
    words     key of tiny_tokenizer.KINDS
    settings  its config, without the special ids, which the tokenizer gives
    embedding standard deviation of the input embeddings
    untied    give the output layer its own weights, as T5 1.1 checkpoints do although the config ties them
    spare     embedding rows beyond the tokenizer's last id, as T5 and Qwen have
    """

    family: Family
    model: str
    words: str
    settings: dict[str, Any] = field(default_factory=dict)
    embedding: float = MATRIX
    untied: bool = False
    spare: int = 0


WINDOW = 4  # shorter than any prompt worth testing
POSITIONS = 128

# Spelled once: what most decoders call by the same name.
DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "attention_dropout": 0.1,
}
ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
BERT: dict[str, Any] = {**ENCODER, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
# 4 heads of 6 on 32 hidden: d_kv is not hidden / heads. The decoder is the shallower side, because `generate`
# sizes T5's cache by num_layers (seen in transformers 5.23), and would have no layer for the rest.
T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "dropout_rate": 0.1,
}
GATED: dict[str, Any] = {**T5, "feed_forward_proj": "gated-gelu"}

TINY: dict[str, Builder] = {
    "llama": Builder("causal", "LlamaForCausalLM", "llama", DECODER),
    "qwen2": Builder("causal", "Qwen2ForCausalLM", "qwen", {**DECODER, "tie_word_embeddings": True}, spare=8),
    "qwen3": Builder("causal", "Qwen3ForCausalLM", "qwen", {**DECODER, "head_dim": 12}, spare=8),
    "mistral": Builder("causal", "MistralForCausalLM", "gemma", {**DECODER, "sliding_window": WINDOW}),
    "gemma2": Builder(
        "causal",
        "Gemma2ForCausalLM",
        "gemma",
        {
            **DECODER,
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Builder(
        "causal",
        "Gemma3ForCausalLM",
        "gemma",
        {
            **DECODER,
            "num_hidden_layers": 3,
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "gpt2": Builder(
        "causal",
        "GPT2LMHeadModel",
        "gpt2",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": POSITIONS,
            "attn_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "resid_pdrop": 0.1,
        },
    ),
    "gpt-neox": Builder(
        "causal", "GPTNeoXForCausalLM", "gpt2", {**ENCODER, "attention_dropout": 0.1, "hidden_dropout": 0.1}
    ),
    "opt": Builder(
        "causal",
        "OPTForCausalLM",
        "opt",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "layerdrop": 0.1,
        },
    ),
    "phi": Builder("causal", "PhiForCausalLM", "gpt2", {**DECODER, "embd_pdrop": 0.1, "resid_pdrop": 0.1}),
    "olmo2": Builder("causal", "Olmo2ForCausalLM", "olmo", DECODER),
    "mixtral": Builder(
        "causal",
        "MixtralForCausalLM",
        "gemma",
        {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1},
    ),
    # T5's embeddings are large (RMS 1 here, near 10 in real T5 1.1); tied logits are scaled by 1/√hidden.
    "t5": Builder("encoder-decoder", "T5ForConditionalGeneration", "t5", T5, embedding=1.0, spare=5),
    "t5-gated": Builder(
        "encoder-decoder",
        "T5ForConditionalGeneration",
        "t5",
        {**GATED, "tie_word_embeddings": False},
        embedding=1.0,
        untied=True,
        spare=5,
    ),
    "mt5": Builder("encoder-decoder", "MT5ForConditionalGeneration", "t5", GATED, embedding=1.0, untied=True),
    "umt5": Builder("encoder-decoder", "UMT5ForConditionalGeneration", "t5", GATED, embedding=1.0),
    "bart": Builder(
        "encoder-decoder",
        "BartForConditionalGeneration",
        "bart",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": POSITIONS,
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "activation_dropout": 0.1,
            "encoder_layerdrop": 0.1,
            "decoder_layerdrop": 0.1,
        },
    ),
    "bert": Builder("encoder", "BertForMaskedLM", "bert", BERT),
    "roberta": Builder("encoder", "RobertaForMaskedLM", "bart", {**BERT, "type_vocab_size": 1}),
    "deberta-v2": Builder(
        "encoder",
        "DebertaV2ForMaskedLM",
        "deberta",
        {
            **BERT,
            "type_vocab_size": 0,
            "relative_attention": True,
            "position_biased_input": False,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
    ),
    "modernbert": Builder(
        "encoder",
        "ModernBertForMaskedLM",
        "modernbert",
        {
            **ENCODER,
            "local_attention": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "attention_dropout": 0.1,
            "embedding_dropout": 0.1,
            "mlp_dropout": 0.1,
            "classifier_dropout": 0.1,
        },
    ),
    "mamba": Builder(
        "recurrent",
        "MambaForCausalLM",
        "gpt2",
        {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 2},
    ),
    # Half attention, half recurrence: its cache looks like one of keys and values at first glance.
    "qwen3-next": Builder(
        "recurrent",
        "Qwen3NextForCausalLM",
        "qwen",
        {
            **DECODER,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "num_experts": 0,
            "num_experts_per_tok": 1,
        },
    ),
}


def names(*families: Family) -> list[str]:
    """The names in TINY of these families, in its order; without arguments all but the ones to be refused."""
    wanted = families or ("causal", "encoder-decoder", "encoder")
    return [name for name, builder in TINY.items() if builder.family in wanted]


def build(
    name: str, seed: int = 0, dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """(model, tokenizer): TINY[name] with weights drawn from `seed`, the same numbers in every dtype.

    The model is in train(), as constructed. The global random state is neither read nor changed.
    """
    import torch
    import transformers

    builder = _builder(name)
    tokenizer = build_tokenizer(builder.words, max_length=POSITIONS)
    architecture = getattr(transformers, builder.model)
    config = architecture.config_class(**_special_ids(tokenizer, builder), **builder.settings)
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = architecture(config)
    if builder.untied:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    _draw(model, builder, torch.Generator().manual_seed(seed))
    model = model.to(getattr(torch, dtype))
    if "num_local_experts" in builder.settings:
        # The grouped kernel takes no float64 (seen in transformers 5.23).
        model.set_experts_implementation("eager")
    return model, tokenizer


def save(name: str, folder: str | Path, seed: int = 0) -> None:
    """TINY[name] as an ordinary `save_pretrained` folder, which AutoModel and AutoTokenizer read offline.

    The folder must be new or empty: StorageError otherwise.
    """
    from transformers import logging

    model, tokenizer = build(name, seed)
    path = Path(folder)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with atomic_folder(path, overwrite=path.is_dir() and not any(path.iterdir())) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    finally:
        if shown:
            logging.enable_progress_bar()


def _builder(name: str) -> Builder:
    if name not in TINY:
        raise BackboneError(f"tiny model {name!r} does not exist{nearest(name, TINY) or '; see tiny.TINY'}")
    return TINY[name]


def _special_ids(tokenizer: PreTrainedTokenizerFast, builder: Builder) -> dict[str, Any]:
    """The config's view of the tokenizer; a role that the tokenizer lacks is None, as in the real family."""
    ids: dict[str, Any] = {
        f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")
    }
    if builder.words == "modernbert":
        ids |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
        ids |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    ids["vocab_size"] = len(tokenizer) + builder.spare
    if builder.family == "encoder-decoder":
        # T5 starts its decoder with padding, BART with </s>.
        ids["decoder_start_token_id"] = ids["pad_token_id"] if builder.words == "t5" else ids["eos_token_id"]
    return ids


def _draw(model: PreTrainedModel, builder: Builder, source: torch.Generator) -> None:
    """W ~ N(0, MATRIX²); a vector keeps its family's 0 or 1 (Gemma's norms: 0) and moves by N(0, VECTOR²)."""
    import torch

    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=source)
            if weight.dim() == 1:
                weight.add_(VECTOR * noise)
            else:
                weight.copy_((builder.embedding if weight is embeddings else MATRIX) * noise)
        for key, buffer in model.named_buffers():
            if key.endswith("final_logits_bias"):  # BART's: a buffer, but part of the function
                buffer.copy_(VECTOR * torch.randn(buffer.shape, generator=source))
