"""min_theta -log p(text): a small backbone from nothing, Llama (causal) or T5 1.1 (encoder-decoder).

Lester et al. 2021, section 2.2: a T5 that saw span corruption alone is hard to prompt, so LM adaptation
follows. Folder: tokenizer/, tokens of the corpus, checkpoint, metrics.jsonl, and export/, an ordinary model
folder with a card.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from incipit import files
from incipit.backbones import load
from incipit.backbones.starting import lend_blocks, lend_embeddings, start_from
from incipit.batch import IGNORE, Batch, Encoded, collate
from incipit.errors import RecipeError, nearest
from incipit.tasks import raw, vocabulary
from incipit.train import FitSettings, Trainee, fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# B rows, T text length, H hidden, V vocabulary
FAMILIES = ("causal", "encoder-decoder")


@dataclass(frozen=True)
class PretrainSettings:
    """All choices of one pre-training run."""

    name: str
    family: str  # "causal" (Llama) | "encoder-decoder" (T5 1.1)
    corpus: tuple[str, ...]  # .jsonl or .txt files, plain, .gz or .xz, or patterns of such
    validation: tuple[str, ...]  # held-out files of the same form
    fit: FitSettings
    text_field: str = "text"
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)  # {"source": ["books: *"]}
    vocabulary: int = 8192
    vocabulary_documents: int = 12000  # documents that the tokenizer is trained on
    hidden: int = 256
    layers: int = 4  # of each stack
    heads: int = 4
    kv_heads: int = 4  # causal only
    ffn: int = 640
    activation: str = "gelu"  # "gelu" | "silu", encoder-decoder only: Llama's is "silu"
    tied: bool = True  # causal only: transformers 5.23 ties input and output of every T5
    context: int = 256  # tokens of a block
    positions: int = 512  # longest text the model is declared for
    stages: Sequence[tuple[float, Mapping[str, float]]] = (
        (0.0, {"causal": 1.0}),
    )  # from this share of the run on
    validation_blocks: int = 64
    units: Mapping[str, float] = field(default_factory=dict)  # learning-rate unit by parameter name
    embeddings: str = ""  # a backbone from which the embeddings of common pieces start ("builtin:lm")
    blocks: str = ""  # a causal backbone whose layers and embeddings both stacks of a T5 start from
    start: str = ""  # a backbone of this very shape: its weights and vocabulary (LM adaptation)
    export_minutes: float = 10.0
    seed: int = 0
    note: str = ""  # for the card: where the text comes from, its licence

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise RecipeError(f"family {self.family!r} cannot be pre-trained{nearest(self.family, FAMILIES)}")
        if self.hidden % self.heads:
            raise RecipeError(
                f"hidden {self.hidden} is no multiple of heads {self.heads}: change one of them"
            )
        origins = {k: getattr(self, k) for k in ("start", "blocks", "embeddings") if getattr(self, k)}
        if len(origins) > 1:
            raise RecipeError(f"{origins} name several places to start from: leave one")
        if self.blocks and self.family != "encoder-decoder":
            raise RecipeError(
                f"blocks = {self.blocks!r} starts an encoder-decoder: a {self.family} has start"
            )


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


class _TokenLoss(torch.autograd.Function):
    """nll_i = -log softmax(W h_i)[y_i] with one [N, V] softmax kept, in the dtype of h.

    The gradient of the logits is softmax - onehot; the weights of the rows enter through h, not [N, V].
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """states [N, H], weight [V, H], targets [N] -> nll [N] float32."""
        head = weight.to(states.dtype)
        share = torch.softmax(states @ head.T, dim=-1)  # [N, V]
        picked = share.gather(1, targets[:, None]).float().squeeze(1)  # [N]
        share.scatter_add_(1, targets[:, None], torch.full_like(picked, -1.0, dtype=share.dtype)[:, None])
        ctx.save_for_backward(states, head, share)
        return -picked.clamp_min(1e-38).log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        states, head, share = ctx.saved_tensors
        scale = grads[0][:, None].to(states.dtype)  # [N, 1]
        return (share @ head) * scale, (share.T @ (states * scale)).float(), None


def token_loss(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """nll [N] of targets [N] under softmax(weight [V, H] states [N, H])."""
    nll: Tensor = _TokenLoss.apply(states, weight, targets)  # type: ignore[no-untyped-call]
    return nll


def objective(model: Any) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """Batch -> (nll [B], count [B]) of the model's own loss; only label positions reach the head."""
    causal = not model.config.is_encoder_decoder

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        if causal:  # every row fills its block, so joining needs no gaps: [B, 1] + [B, T - 1]
            ids = torch.cat([batch.input_ids, batch.target_ids], dim=1)  # [B, T]
            states = model.model(input_ids=ids, use_cache=False).last_hidden_state
            states = states[:, batch.input_ids.shape[1] - 1 : -1]  # [B, T - 1, H]
        else:
            start = torch.full_like(batch.target_ids[:, :1], model.config.decoder_start_token_id)
            shifted = torch.cat([start, batch.target_ids[:, :-1]], dim=1)
            encoded = model.encoder(
                input_ids=batch.input_ids, attention_mask=batch.input_mask
            ).last_hidden_state
            states = model.decoder(
                input_ids=shifted,
                encoder_hidden_states=encoded,
                encoder_attention_mask=batch.input_mask,
                use_cache=False,
            ).last_hidden_state
            states = states * model.config.d_model**-0.5  # the scale of a T5 whose head is its embedding
        kept = batch.labels != IGNORE  # [B, U]
        chosen = states[kept]  # [N, H]
        if torch.is_autocast_enabled(chosen.device.type):
            chosen = chosen.to(torch.bfloat16)
        with torch.autocast(chosen.device.type, enabled=False):
            each = token_loss(chosen, model.lm_head.weight, batch.labels[kept])  # [N]
        owner = kept.nonzero()[:, 0]  # row of each label token
        nll = torch.zeros(len(batch), device=each.device).index_add(0, owner, each)
        return nll, kept.sum(1)

    return run


def held_out(
    loss: Callable[[Batch], tuple[Tensor, Tensor]],
    rows: Sequence[Encoded],
    precision: str,
    micro_batch: int = 16,
) -> dict[str, float]:
    """exp(mean nll of a label token) over fixed rows."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    nll = count = 0.0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        for first in range(0, len(ordered), micro_batch):
            sums, counts = loss(collate(ordered[first : first + micro_batch]))
            nll, count = nll + float(sums.double().sum()), count + float(counts.sum())
    return {"perplexity": math.exp(nll / count), "nll": nll / count, "tokens": count}


def pretrain(
    settings: PretrainSettings, folder: files.PathLike, *, resume: bool = False, allow: Sequence[str] = ()
) -> Path:
    """Run, or go on with, one pre-training; returns the exported model folder."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    origin: Any = load(settings.start, dtype="float32") if settings.start else None
    if origin is not None and not files.exists(folder / "tokenizer"):
        vocabulary.save_tokenizer(origin.tokenizer, folder / "tokenizer")
    elif not files.exists(folder / "tokenizer"):
        texts = raw.documents(raw.expand(settings.corpus), field=settings.text_field, where=settings.where)
        made = vocabulary.train_tokenizer(
            itertools.islice(texts, settings.vocabulary_documents),
            size=settings.vocabulary,
            family=settings.family,
            max_length=settings.positions,
        )
        vocabulary.save_tokenizer(made, folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def tokens(paths: Sequence[str], name: str) -> raw.Ids:
        where, text = settings.where, settings.text_field
        return raw.tokenise(raw.expand(paths), tokenizer, folder / name, field=text, where=where)

    ids, held = tokens(settings.corpus, "train"), tokens(settings.validation, "validation")
    model = build(settings, tokenizer)
    if origin is not None:
        start_from(origin, model)
    elif settings.blocks:
        lend_blocks(settings.blocks, model, tokenizer)
    elif settings.embeddings:
        lend_embeddings(settings.embeddings, model, tokenizer)
    loss = objective(model)
    total = settings.fit.steps * settings.fit.batch
    stages = [(round(share * total), dict(mix)) for share, mix in settings.stages]
    stream = _stream(ids, settings, tokenizer, stages)
    rows = _stream(held, settings, tokenizer, [(0, stages[-1][1])]).next(settings.validation_blocks)

    def evaluate(live: Sequence[int]) -> dict[int, dict[str, float]]:
        return {k: held_out(loss, rows, settings.fit.precision) for k in live}

    exported = [time.monotonic()]

    def after_save(step: int) -> None:
        if step == settings.fit.steps or time.monotonic() - exported[0] > 60 * settings.export_minutes:
            export(model, tokenizer, settings, folder, step, len(ids))
            exported[0] = time.monotonic()

    identity = {"model": model.config.to_diff_dict(), "seed": settings.seed, "tokens": len(ids)}
    if origin is not None:
        identity["start"] = origin.fingerprint
    trainee = Trainee(settings.name, model, stream, settings.units)
    fit(
        [trainee],
        loss,
        settings.fit,
        folder,
        collate,
        evaluate=evaluate,
        identity=identity,
        resume=resume,
        allow=allow,
        after_save=after_save,
    )
    if not files.exists(folder / "export" / "config.json"):
        export(model, tokenizer, settings, folder, settings.fit.steps, len(ids))
    return folder / "export"


def _stream(
    ids: Any,
    settings: PretrainSettings,
    tokenizer: PreTrainedTokenizerBase,
    stages: Sequence[tuple[int, Mapping[str, float]]],
) -> raw.RawStream:
    causal = settings.family == "causal"
    sentinels = [] if causal else [len(tokenizer) - 1 - i for i in range(32)]
    return raw.RawStream(
        ids,
        settings.context,
        stages,
        seed=settings.seed,
        start=tokenizer.bos_token_id if causal else -1,
        end=tokenizer.eos_token_id,
        sentinels=sentinels,
    )


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: PretrainSettings,
    folder: Path,
    step: int,
    tokens: int,
) -> None:
    """Write export/: bfloat16 safetensors, tokenizer, card and curve; whole or not at all."""
    curve = [r for r in files.read_jsonl(folder / "metrics.jsonl") if r["step"] <= step]
    with files.atomic_folder(folder / "export", overwrite=True) as part:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(part)  # type: ignore[arg-type]
        tokenizer.save_pretrained(str(part))
        files.atomic_write(part / "README.md", card(model, settings, curve, step, tokens))
        files.write_json(part / "curve.json", curve)


def card(
    model: nn.Module, settings: PretrainSettings, curve: Sequence[Mapping[str, Any]], step: int, tokens: int
) -> str:
    """What the model is, what it read, how it was trained, how well it predicts held-out text."""
    shape = f"hidden {settings.hidden}, {settings.layers} layers, {settings.heads} heads, FFN {settings.ffn}"
    weights = sum(p.numel() for p in model.parameters())
    recipe = asdict(settings) | {
        "corpus": [Path(p).name for p in settings.corpus],
        "validation": [Path(p).name for p in settings.validation],
        "start": "/".join(Path(settings.start).parts[-2:]),  # a card names no place of one machine
    }
    seen = step * settings.fit.batch * settings.context
    dev = [r for r in curve if "scores" in r]
    lines = [f"| {r['step']} | {r['scores']['nll']:.3f} | {r['scores']['perplexity']:.1f} |" for r in dev]
    return "\n".join(
        [
            f"# {settings.name}",
            "",
            f"A small {settings.family} language model of {weights:,} weights ({shape}), trained by incipit.",
            f"It read {seen:,} tokens ({step} of {settings.fit.steps} steps); the corpus has {tokens:,}.",
            "It is a backbone for trying prompt methods offline, not a source of facts.",
            *([settings.note] if settings.note else []),
            "",
            "## Held-out text",
            "",
            "| step | nll a token | perplexity |",
            "|---|---|---|",
            *lines,
            "",
            "## Recipe",
            "",
            "```toml",
            files.dump_toml({k: v for k, v in recipe.items() if k != "stages"}).rstrip(),
            "```",
            "",
            "Objectives by share of the run: "
            + "; ".join(f"from {s:g}: {dict(m)}" for s, m in settings.stages),
            "",
        ]
    )
