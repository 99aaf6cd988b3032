"""What a prompt means, written out: one row at a time, no batch, no mask, no sharing, nothing of the library's forward.

Input rows are concatenated before the embedded text, or behind it (before the token that ends it). Keys and values of a
causal model are an ordinary filled cache. Those of the other families enter in an attention that is spelled
softmax(q [P_K; K]^T) [P_V; V]. An isolated prompt is the joint row under an encoder mask that forbids the prompt to
look at the text; so are those that see a part of themselves.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from incipit.backbones import tiny
from incipit.batch import Encoded
from incipit.injection import Injection


def family(name: str) -> str:
    return tiny.TINY[name.removesuffix("-single")].family


MODELS: dict[str, Any] = {}
PREFIX: dict[int, tuple[Tensor, Tensor]] = {}  # id(module) -> keys and values [1, N, P, D] of the running row


def written_out(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    scores = scale * query @ key.transpose(-1, -2)
    if position_bias is not None:
        scores = scores + position_bias
    if mask is not None:
        scores = scores + mask
    if id(module) in PREFIX:
        front, more = PREFIX[id(module)]
        scores = torch.cat([scale * query @ front.transpose(-1, -2), scores], dim=-1)
        value = torch.cat([more, value], dim=2)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None


AttentionInterface.register("written_out", written_out)
AttentionMaskInterface.register("written_out", eager_mask)


def model(name: str) -> Any:
    """A second copy of the model, which the library never touched."""
    name = name.removesuffix("-single")
    if name not in MODELS:
        made = tiny.build(name, dtype="float64")[0].eval()
        if family(name) != "causal" and name != "deberta-v2":
            made.set_attn_implementation("written_out")
        MODELS[name] = made
    return MODELS[name]


def attentions(name: str, site: str) -> list[Any]:
    """The attention modules of a site, by their names in transformers."""
    found = {
        "encoder": ("encoder.", ("SelfAttention", "self_attn", "attention.self")),
        "decoder": ("decoder.", ("SelfAttention", "self_attn")),
        "cross": ("decoder.", ("EncDecAttention", "encoder_attn")),
    }[site]
    if name == "modernbert":
        found = ("layers.", (".attn",))
    return [m for n, m in model(name).named_modules() if found[0] in n and n.endswith(found[1])]


def closing(name: str, encoded: Encoded) -> int:
    """How many tokens end the text: [SEP] or </s> at its end."""
    words = tiny.build_tokenizer(tiny.TINY[name.removesuffix("-single")].words, tiny.POSITIONS)
    ends = {"encoder": [words.sep_token_id], "encoder-decoder": [words.eos_token_id]}.get(family(name), [])
    return int(encoded.input_ids[-1:] != () and encoded.input_ids[-1] in ends)


def embedded(name: str, part: Injection, encoded: Encoded, target: bool) -> Tensor:
    """[1, S, H]: input rows, text, input rows behind it, what ends the text, target."""
    ids = encoded.input_ids + (encoded.target_ids if target else ())
    text = model(name).get_input_embeddings()(torch.tensor(ids, dtype=torch.int64))
    if part.inputs is None:
        return text[None]
    rows = part.inputs[0].double()
    if part.behind is None:
        return torch.cat([rows, text])[None]
    cut = len(encoded.input_ids) - closing(name, encoded)
    return torch.cat([rows[~part.behind[0]], text[:cut], rows[part.behind[0]], text[cut:]])[None]


def places(name: str, part: Injection, encoded: Encoded) -> list[int]:
    """Where the tokens of the text stand in its row."""
    count, end = len(encoded.input_ids), closing(name, encoded)
    rows = 0 if part.inputs is None else part.inputs.shape[1]
    late = 0 if part.behind is None else int(part.behind.sum())
    return [*range(rows - late, rows - late + count - end), *range(rows + count - end, rows + count)]


def visible(part: Injection, rows: list[int], total: int) -> Tensor:
    """What is added to the scores [1, 1, S, S]: what the prompt's positions `rows` may not look at."""
    mask = torch.zeros(1, 1, total, total, dtype=torch.float64)
    for q in rows:
        for k in range(total):
            hidden = (
                part.isolated
                if k not in rows
                else {"all": False, "before": k > q, "itself": k != q}[part.within]
            )
            if hidden:
                mask[..., q, k] = torch.finfo(torch.float64).min
    return mask


def outputs(name: str, part: Injection, **inputs: Any) -> Any:
    """The model's own output under a prompt of keys and values (or none)."""
    whole = model(name)
    PREFIX.clear()
    if part.isolated or part.within != "all":
        embeds = inputs.pop("inputs_embeds")
        late = 0 if part.behind is None else int(part.behind.sum())
        early, end = part.inputs.shape[1] - late, embeds.shape[1]  # no text of these tests has an end token
        mask = visible(part, [*range(early), *range(end - late, end)], end)
        inputs["encoder_outputs"] = whole.get_encoder()(inputs_embeds=embeds, attention_mask=mask)
    for site in part.keys:
        layers = [(k.double(), v.double()) for k, v in zip(part.keys[site], part.values[site], strict=True)]
        if family(name) == "causal":
            inputs["past_key_values"] = DynamicCache()
            for layer, (key, value) in enumerate(layers):
                inputs["past_key_values"].update(key, value, layer)
        else:
            for module, layer in zip(attentions(name, site), layers, strict=True):
                PREFIX[id(module)] = layer
    try:
        return whole(**inputs, output_hidden_states=family(name) == "encoder")
    finally:
        PREFIX.clear()


def nll(name: str, part: Injection, encoded: Encoded) -> Tensor:
    """-log p of the trained target tokens of one row, or of its class."""
    if family(name) == "encoder":
        return -scores(name, part, encoded).log_softmax(dim=-1)[encoded.choice]
    target = torch.tensor(encoded.target_ids)
    if family(name) == "causal":
        embeds = embedded(name, part, encoded, target=True)
        logits = outputs(name, part, inputs_embeds=embeds).logits[0, -len(target) - 1 : -1]
    else:
        embeds = embedded(name, part, encoded, target=False)
        logits = outputs(name, part, inputs_embeds=embeds, labels=target[None]).logits[0]
    each = -logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0]
    return each[torch.tensor(encoded.trained or [True] * len(target))].sum()


def scores(name: str, part: Injection, encoded: Encoded) -> Tensor:
    """Class scores [C] of an encoder."""
    readout = part.readout
    out = outputs(name, part, inputs_embeds=embedded(name, part, encoded, target=False))
    at = places(name, part, encoded)
    text = out.hidden_states[-1][0, at]
    vectors, bias = readout.vectors[0].double(), readout.bias[0].double()
    if (
        readout.pool == "mask"
    ):  # the verbalizer's vectors are rows of the output layer: find them, read its logits
        weight = model(name).get_output_embeddings().weight
        ids = [int((weight - v).abs().sum(dim=1).argmin()) for v in vectors]
        return out.logits[0, at[list(encoded.input_ids).index(mask_id(name))], ids]
    pooled = text.mean(dim=0)
    if readout.cosine:
        pooled, vectors = F.normalize(pooled, dim=0), F.normalize(vectors, dim=1)
    return readout.scale * vectors @ pooled + bias


def mask_id(name: str) -> int:
    return int(tiny.build_tokenizer(tiny.TINY[name].words, tiny.POSITIONS).mask_token_id)


def written(name: str, part: Injection, encoded: Encoded, count: int, stop: tuple[int, ...]) -> list[int]:
    """Greedy continuation of one row, recomputed whole for every token."""
    found: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            if family(name) == "causal":
                embeds = embedded(name, part, Encoded(encoded.input_ids, tuple(found)), target=True)
                logits = outputs(name, part, inputs_embeds=embeds).logits[0, -1]
            else:
                start = model(name).config.decoder_start_token_id
                embeds = embedded(name, part, encoded, target=False)
                decoder = torch.tensor([[start, *found]])
                logits = outputs(name, part, inputs_embeds=embeds, decoder_input_ids=decoder).logits[0, -1]
            token = int(logits.argmax())
            if token in stop:
                break
            found.append(token)
    return found
