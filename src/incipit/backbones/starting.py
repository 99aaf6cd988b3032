"""Where a pre-training starts: another backbone's weights, or the blocks of a causal one in both stacks of a T5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from incipit.backbones.internals import bias_before
from incipit.backbones.load import load
from incipit.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def start_from(origin: Any, model: PreTrainedModel) -> None:
    """Give `model` the weights of backbone `origin`; RecipeError where a name or a shape differs."""
    theirs, ours = origin.model.state_dict(), model.state_dict()
    shapes = {k: tuple(v.shape) for k, v in ours.items()}
    other = [k for k in shapes.keys() | theirs.keys() if k not in theirs or theirs[k].shape != shapes.get(k)]
    if other:
        first = min(other)
        raise RecipeError(
            f"start = {origin.name!r}: {len(other)} of its weights differ from this recipe's model, first {first}: "
            f"{tuple(theirs[first].shape) if first in theirs else 'absent'} there, {shapes.get(first, 'absent')} here: "
            "give the recipe the shape and family of the backbone that it starts from"
        )
    model.load_state_dict(theirs)


def lend_blocks(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Start a T5 from the causal backbone `name` (Llama blocks): both stacks get its layers, its vocabulary its rows.

    After Zhang et al. 2025 (arXiv 2504.06225), who adapt a decoder-only model to an encoder-decoder. Llama has no
    cross-attention: here it begins with the weights of the self-attention beside it and an output of zero, so the
    decoder is the language model at first and learns to read its encoder. Rotary positions do not carry over: a T5
    has one bias a head and distance for all layers, so the heads of a layer are sorted by how near they look, and
    the biases begin as the log of what the lender's heads give to each distance. T5 does not scale its products:
    queries and keys are each divided by the fourth root of the head's width.

    Raises RecipeError where the backbone is no Llama of the same widths, depth and activation, or shares no piece.
    """
    lender: Any = load(name, dtype="float32")
    _check_same_shape(name, lender.model.config, model.config)
    _lend_rows(lender, model, tokenizer)
    config: Any = model.config
    seen = attention_by_distance(lender.model)  # [layers, heads, D]
    order = seen[:, :, :5].sum(-1).argsort(dim=1, descending=True)  # [layers, heads], the nearest first
    profile = torch.stack([layer[rank] for layer, rank in zip(seen, order, strict=True)]).mean(
        0
    )  # [heads, D]
    theirs, ours = lender.model.state_dict(), dict(model.state_dict())
    for stack in ("encoder", "decoder"):
        for index in range(config.num_layers):
            there = {
                k.removeprefix(f"model.layers.{index}."): v
                for k, v in theirs.items()
                if k.startswith(f"model.layers.{index}.")
            }
            for part, weight in _t5_block(there, order[index], stack, config.d_kv).items():
                ours[f"{stack}.block.{index}.layer.{part}"].copy_(weight)
        ours[f"{stack}.final_layer_norm.weight"].copy_(theirs["model.norm.weight"])
        attention = model.get_submodule(f"{stack}.block.0.layer.0.SelfAttention")
        biases = _biases(attention, profile, two_sided=stack == "encoder")
        ours[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].copy_(biases)
    ours["decoder.final_layer_norm.weight"].mul_(config.d_model**0.5)  # a T5 divides by this before its head


def _lend_rows(lender: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Pieces that both know get the lender's embeddings; those of the others come to the same scale."""
    table: Any = model.get_input_embeddings().weight
    theirs = lender.table.weight.detach()
    known = lender.tokenizer.get_vocab()
    pairs = [(i, known[piece]) for piece, i in tokenizer.get_vocab().items() if piece in known]
    if not pairs:
        raise RecipeError(
            f"blocks = {lender.name!r}: its vocabulary of {len(known)} pieces and this model's of {len(table)} have "
            "none in common: name a backbone with a like vocabulary"
        )
    ours, there = (torch.tensor(part) for part in zip(*pairs, strict=True))
    with torch.no_grad():
        table.div_(table.square().mean().sqrt() / theirs[there].square().mean().sqrt())
        table[ours] = theirs[there]


def _check_same_shape(name: str, theirs: Any, ours: Any) -> None:
    have = {
        "model_type": theirs.model_type,
        "hidden": theirs.hidden_size,
        "layers": theirs.num_hidden_layers,
        "heads": theirs.num_attention_heads,
        "ffn": getattr(theirs, "intermediate_size", None),
        "activation": getattr(theirs, "hidden_act", None),
    }
    want = {
        "model_type": "llama",
        "hidden": ours.d_model,
        "layers": ours.num_layers,
        "heads": ours.num_heads,
        "ffn": ours.d_ff,
        "activation": ours.dense_act_fn,
    }
    other = [f"{k} {have[k]} (the recipe has {want[k]})" for k in want if have[k] != want[k]]
    if other:
        raise RecipeError(f"blocks = {name!r}: it has {', '.join(other)}: make them equal")


def _t5_block(
    llama: dict[str, torch.Tensor], rank: torch.Tensor, stack: str, width: int
) -> dict[str, torch.Tensor]:
    """Weights of one T5 block by the name of its part, from one Llama layer; heads in the order of `rank` [heads]."""

    def heads(weight: torch.Tensor) -> torch.Tensor:
        """[(key/value) heads * width, H] -> [heads * width, H]: queries that share a key each get a copy of it."""
        each = weight.view(-1, width, weight.shape[1])
        return each.repeat_interleave(len(rank) // len(each), 0)[rank].flatten(0, 1)

    attention = {
        "q": heads(llama["self_attn.q_proj.weight"]) * width**-0.25,
        "k": heads(llama["self_attn.k_proj.weight"]) * width**-0.25,
        "v": heads(llama["self_attn.v_proj.weight"]),
        "o": heads(llama["self_attn.o_proj.weight"].T).T,
    }
    found = {f"0.SelfAttention.{k}.weight": v for k, v in attention.items()}
    found["0.layer_norm.weight"] = llama["input_layernorm.weight"]
    last = 1
    if stack == "decoder":
        attention["o"] = torch.zeros_like(attention["o"])
        found |= {f"1.EncDecAttention.{k}.weight": v for k, v in attention.items()}
        found["1.layer_norm.weight"] = llama["input_layernorm.weight"]
        last = 2
    for ours, theirs in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
        found[f"{last}.DenseReluDense.{ours}.weight"] = llama[f"mlp.{theirs}_proj.weight"]
    found[f"{last}.layer_norm.weight"] = llama["post_attention_layernorm.weight"]
    return found


def attention_by_distance(model: Any, length: int = 128, rows: int = 8) -> torch.Tensor:
    """[layers, heads, length]: mean attention of a causal model to the token d places before, on random text."""
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that gives its weights
    try:
        with torch.no_grad():
            layers = model(ids, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    by_distance = [[layer.diagonal(-d, 2, 3).mean((0, 2)) for d in range(length)] for layer in layers]
    return torch.stack([torch.stack(distances, dim=1) for distances in by_distance])


def _biases(attention: Any, profile: torch.Tensor, *, two_sided: bool) -> torch.Tensor:
    """Relative biases [buckets, heads] of a T5 attention: mean log of `profile` [heads, D], the same to both sides."""
    table = attention.relative_attention_bias.weight  # [buckets, heads]
    with torch.no_grad():
        table.copy_(
            torch.arange(len(table))[:, None].expand_as(table)
        )  # so that the bias of a pair is its bucket
        bucket = bias_before(attention, profile.shape[1], 0, profile.shape[1])[0, 0].long()  # [D, D]
    places = torch.arange(profile.shape[1])
    distance = (places[:, None] - places[None, :]).abs()
    kept = torch.ones_like(distance, dtype=torch.bool) if two_sided else places[:, None] >= places[None, :]
    log = profile.clamp_min(1e-5).log()[:, distance[kept]]  # [heads, pairs]
    sums = torch.zeros(len(profile), len(table)).index_add(1, bucket[kept], log)
    counts = torch.zeros(len(table)).index_add(0, bucket[kept], torch.ones(log.shape[1]))
    return (sums / counts.clamp_min(1)).T
