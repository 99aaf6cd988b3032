"""The tables of a recipe: backbone, prompt, train, decode, and those that are absent where nothing is meant.

The text under a field is its line in docs/cli.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Whole: TypeAlias = Annotated[int, Field(ge=0)]
Counted: TypeAlias = Annotated[int, Field(ge=1)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]


class Table(BaseModel):
    """A TOML table: unknown keys and converted types are problems, and a made one does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class BackboneTable(Table):
    """[backbone]: the frozen model."""

    name: str = "builtin:minilm"
    """A Hugging Face id, a local folder, or builtin:minilm, builtin:lm, builtin:t5."""
    dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] = "float32"
    """What the frozen weights are held in; "auto": as they are stored."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; "auto": the first accelerator, else cpu."""
    revision: str = ""
    """Branch, tag or commit of a hub id; empty: its main branch."""
    trust_code: bool = False
    """Run Python code that comes with the model. Only for a source you trust."""
    sentinel: str = ""
    """Encoder-decoders: a special token before every target, left out of what is written: "<extra_id_0>" for a T5 that
    has seen span corruption alone."""


class PromptTable(Table):
    """[prompt]: what is learned, where it enters, where it starts."""

    kind: Literal["input", "prefix", "none"] = "input"
    """"input": soft rows before the input. "prefix": keys and values in every layer.
    "none": only the text of `layout`."""
    length: Counted = 20
    """Number of soft rows."""
    start: Literal["label", "vocabulary", "text", "uniform", "normal", "given"] = "label"
    """Initial values: label words, frequent pieces of the vocabulary, `text`, random numbers (uniform: small, as in the
    paper; normal: as large as the embeddings), or `source`.
    Without this key: "label" where the task has label words, else "vocabulary"."""
    text: str = ""
    """start = "text": the words that the first rows start from."""
    source: str = ""
    """start = "given": an artifact folder, a .npy file, or a PEFT folder."""
    layout: str = ""
    """Constant text around the soft rows: "{bos}You sort mail. {soft}". {input}: where the input stands, if not last:
    "{bos}{input}{soft}". Empty: chosen by the family of the backbone and the kind."""
    attention: Literal[
        "joint", "isolated", "joint-causal", "joint-alone", "isolated-causal", "isolated-alone"
    ] = "joint"
    """Encoder-decoders: "joint": prompt and input see each other, as in the paper. "isolated": the input sees the
    prompt, the prompt only itself, so it is computed once for all rows; another function, and a faster one.
    "-causal": a prompt row sees no later one; "-alone": no other one."""
    sites: Annotated[tuple[Literal["encoder", "decoder", "cross"], ...], Field(strict=False)] = ()
    """kind = "prefix": which attentions get keys and values; empty: all that the backbone has."""
    reparametrise: Literal["", "mlp", "lstm"] = ""
    """A network in front of the rows while they are trained; dropped from the artifact."""
    hidden: Counted = 128
    """Width of that network."""
    vocabulary: Counted = 5000
    """How many of the most frequent pieces a start draws from."""
    readout: Literal["words", "verbalizer", "head"] = "words"
    """How an encoder answers: nearest label word, its mask token, or a trained linear head."""
    head_lr: Annotated[float, Field(gt=0)] = 0.01
    """Learning rate of that head (absolute)."""


class TrainTable(Table):
    """[train]: how long, how fast, how often."""

    method: Literal["prompt", "model", "lora", "ia3"] = "prompt"
    """What is trained: the prompt on a frozen backbone, the whole backbone (model tuning), or for comparison PEFT's
    adapters inside its layers ("lora", "ia3"; needs peft), of which only scores are kept."""
    rank: Counted = 8
    """method = "lora": rank of the added matrices."""
    steps: Counted = 1000
    """Optimiser steps."""
    batch: Counted = 32
    """Examples a step."""
    lr: Annotated[float, Field(gt=0)] = 0.03
    """Step size in units of the backbone's embedding RMS.
    method = "model", "lora", "ia3": absolute, and 0.001 without this key."""
    lr_absolute: Annotated[float, Field(gt=0)] | None = None
    """Step size in plain numbers, in place of `lr` (the paper's 0.3 for T5)."""
    optimiser: Literal["adafactor", "adamw"] = "adafactor"
    """"adafactor" as in the paper (no parameter scaling), or "adamw"."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the rate after the warm-up."""
    warmup: Whole = 0
    """Steps over which the rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    """Share of each number that a step takes away; optimiser = "adamw": this share times the rate."""
    wayward: Annotated[float, Field(gt=0)] | None = None
    """Pull the rows to the words of prompt.text that they start from, by this much; without this key: not at all."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Greatest norm of the gradient; 0: no limit."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the forward pass is computed in, where the hardware multiplies it; prompt and optimiser stay in float32."""
    seeds: Annotated[tuple[Whole, ...], Field(strict=False)] = (0,)
    """One prompt is trained for each seed, all in one process (other methods: one after another)."""
    eval_every: Counted = 100
    """Steps between scores on validation; the last step is always scored."""
    eval_limit: Whole = 0
    """Validation examples that each of these scores reads, the same ones every time, chosen by lot; 0: all."""
    patience: Whole = 0
    """Stop after this many scores without a better one; 0: never."""
    match: float | None = None
    """Keep the checkpoint whose score on validation is nearest to this (the earliest of equals), to compare methods at
    one score; without this key: the best one."""
    micro_batch: Whole = 0
    """Rows of one forward pass; the result does not change. 0: as many as `memory` holds."""
    memory: Annotated[float, Field(ge=0)] = 0.0
    """Gigabytes that a forward pass may keep for the backward pass: the rows of a step are cut to fit.
    0: 4 on a CPU, half of what the weights leave of a GPU."""
    checkpointing: bool = False
    """Keep each layer's input only, compute the rest again in the backward pass (causal backbones)."""
    save_every: Whole = 0
    """Steps between checkpoints; 0: at the end only."""
    save_minutes: Annotated[float, Field(ge=0)] = 0.0
    """Minutes between checkpoints; 0: never."""
    tensorboard: bool = False
    """Also write curves for TensorBoard."""


class DecodeTable(Table):
    """[decode]: how answers are made."""

    mode: Literal["auto", "rank", "generate"] = "auto"
    """"rank" scores the label words or options, "generate" writes text,
    "auto" ranks where there is a choice."""
    batch: Counted = 64
    """Examples a forward pass."""
    max_new_tokens: Counted = 32
    """Longest written answer."""
    beams: Counted = 1
    """Width of the beam search; 1: greedy."""
    sample: bool = False
    """Draw tokens in place of taking the likeliest."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """sample = true: sharpness of the distribution."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """sample = true: draw from the likeliest tokens that hold this share; 1: from all."""
    top_k: Whole = 0
    """sample = true: draw from this many likeliest tokens; 0: from all."""
    seed: Whole = 0
    """sample = true: seed of the draws."""


class MixtureTable(Table):
    """[mixture]: further tasks that one model is tuned on together with [task]. Absent where none is meant.

    Needs train.method = "model", "lora" or "ia3". The checkpoint is chosen by the mean over the tasks of their first
    metric; every task is scored by itself.
    """

    tasks: Mapping[str, Mapping[str, Any]] = {}
    """Tables like [task], by name: [mixture.tasks.sst2]."""
    rates: Literal["proportional", "equal"] = "proportional"
    """How often a row is of a task: by the size of its train split, or all alike."""
    limit: Whole = 0
    """rates = "proportional": sizes count up to this limit, so that a large task does not crowd out the others; 0: no
    limit."""
    prefix: bool = True
    """Write the task's name before every input, as T5 does; here alone, for a single task needs none."""


class EnsembleTable(Table):
    """[ensemble]: prompts that `incipit ensemble` mixes on the recipe's task. Absent where none is meant."""

    sources: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Artifacts of one backbone; those on the command line stand in their place."""
    method: Literal["vote", "logits", "weighted", "average", "fixed", "sesom"] = "sesom"
    """"vote", "logits", "weighted", "average" learn nothing. "fixed": one learned weight a source. "sesom": weights
    for each sample, by attention over the sources."""
    adapt: bool = False
    """Train a copy of each source on the shots first, as [train] says."""
    folds: Whole = 0
    """adapt = true: the weights learn from scores of copies that were trained without that fold of the shots.
    0: from copies that were trained on all of them."""
    space: Literal["words", "vocabulary"] = "words"
    """What a source says: scores of the label words, or of the whole vocabulary at the first written token."""
    pool: Literal["max", "mean"] = "max"
    """How the input's token embeddings become one vector."""
    inner: Counted = 32
    """Inner width of the two projections."""
    width: Annotated[int, Field(ge=2)] = 64
    """Width of the attention."""
    tau: Annotated[float, Field(ge=0)] = 0.0
    """Temperature of the attention; 0: e times `width`."""
    log_probabilities: bool = True
    """Subtract each source's log-sum-exp from its scores."""
    steps: Counted = 200
    """Steps over the shots."""
    lr: Annotated[float, Field(gt=0)] = 0.01
    """AdamW's rate (absolute)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's weight decay."""
    seed: Whole = 0
    """Of the start, the order and the folds."""


class TransferTable(Table):
    """[transfer]: prompts of other tasks that `incipit transfer` learns the recipe's task from."""

    sources: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Artifacts of one backbone; those on the command line stand in their place."""
    method: Literal["spot", "attempt", "multitask"] = "spot"
    """"spot": start from one of the sources. "attempt": a mixture of them for each input. "multitask": a shared prompt,
    distilled from them on their own tasks, times factors of low rank."""
    pick: Literal["similarity", "search"] = "similarity"
    """method = "spot": the source whose rows are most like those of a prompt that was tuned on the task from its own
    start, or the best on validation of the `top` most similar, each tuned."""
    top: Whole = 0
    """pick = "search": how many sources are tuned; 0: all."""
    inner: Counted = 100
    """method = "attempt": inner width of the attention."""
    gate_lr: Annotated[float, Field(gt=0)] = 0.01
    """method = "attempt": the attention's rate (absolute)."""
    rank: Counted = 1
    """method = "multitask": rank of a task's factors."""
    shared_steps: Counted = 1000
    """method = "multitask": steps of the shared prompt over the sources' tasks."""
    distil: Annotated[float, Field(ge=0)] = 0.9
    """method = "multitask": weight of what the sources say as teachers; 0: labels alone."""
    hidden: bool = True
    """method = "multitask": teachers' hidden states count too (not on causal backbones)."""
