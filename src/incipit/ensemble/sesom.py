"""SESoM: weights for each sample, from its input and from what each source says to it.

# B examples, K sources, H hidden, O scores of a source (C label words or V pieces), W width, R inner width
Peng et al. 2023, "Model ensemble instead of prompt fusion". That the scores before the softmax are mixed, with
attention weights from input and scores, is stated by the authors (abstract, patent US 2024/0070394). The form below,
its sizes and temperature are a reconstruction: nothing here was checked against the paper's text or code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from incipit.backbones import Backbone, EncoderBackbone
from incipit.batch import collate
from incipit.decode import Prediction, ranked, stacked
from incipit.encode import question
from incipit.ensemble.answers import Answers
from incipit.errors import DataError, PromptError, nearest
from incipit.prompts import Prompt
from incipit.tasks.example import Example

SPACES = ("words", "vocabulary")
POOLS = ("max", "mean")
KINDS = ("sesom", "fixed")


@dataclass(frozen=True)
class GateSettings:
    """kind: "sesom", or "fixed" (K learned weights, the same for every sample: the control).

    space: a source's scores are those of the label words, or of the whole vocabulary at the first written position.
    pool: how token embeddings of the input become one vector. tau: temperature of the attention; 0: e · width, which
    starts near the uniform mixture. log_probabilities: subtract each source's log-sum-exp from its scores.
    """

    kind: str = "sesom"
    space: str = "words"
    pool: str = "max"
    inner: int = 32
    width: int = 64
    tau: float = 0.0
    log_probabilities: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for value, known in ((self.kind, KINDS), (self.space, SPACES), (self.pool, POOLS)):
            if value not in known:
                raise PromptError(f"unknown choice {value!r} of an ensemble's gate{nearest(value, known)}")
        if self.inner < 1 or self.width < 2 or self.tau < 0:
            raise PromptError(
                f"inner {self.inner}, width {self.width}, tau {self.tau}: inner must be >= 1, width >= 2, tau >= 0"
            )


class Gate(nn.Module):
    """a_j = softmax_j( <h_x, h_j> / tau ), h_x = LN(U_x act(D_x x)), h_j = LN(U_l act(D_l l_j)); y = sum_j a_j l_j.

    x [H] is the pooled input, l_j [O] what source j says; act = SiLU, no biases. "fixed": a = softmax(w), w [K].
    """

    def __init__(self, settings: GateSettings, hidden: int, outputs: int, sources: int) -> None:
        super().__init__()
        self.settings, self.hidden, self.outputs, self.sources = settings, hidden, outputs, sources
        if settings.kind == "fixed":
            self.weight = nn.Parameter(torch.zeros(sources))  # [K]
            return
        inner, width = settings.inner, settings.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.input = _projection(hidden, inner, width)
            self.output = _projection(outputs, inner, width)

    @property
    def tau(self) -> float:
        """The temperature that is used."""
        return self.settings.tau or math.e * self.settings.width

    def forward(self, inputs: Tensor, scores: Tensor) -> Tensor:
        """inputs [B, H], scores [B, K, O] -> weights [B, K]; each row sums to 1."""
        if self.settings.kind == "fixed":
            return self.weight.softmax(dim=0).expand(len(inputs), -1)  # [B, K]
        x, outputs = self.input(inputs), self.output(scores)  # [B, W], [B, K, W]
        attention: Tensor = (outputs @ x[:, :, None])[:, :, 0] / self.tau  # [B, K]
        return attention.softmax(dim=1)

    def spec(self) -> dict[str, Any]:
        """From which `Gate.built` makes an equal, untrained one."""
        shape = {"hidden": self.hidden, "outputs": self.outputs, "sources": self.sources}
        return {"settings": asdict(self.settings), **shape}

    @classmethod
    def built(cls, spec: Mapping[str, Any]) -> Gate:
        """An untrained gate; PromptError for a spec that lacks a part."""
        try:
            return cls(GateSettings(**spec["settings"]), spec["hidden"], spec["outputs"], spec["sources"])
        except (KeyError, TypeError) as error:
            raise PromptError(f"the gate's spec does not fit this version: {error}") from error


def _projection(size: int, inner: int, width: int) -> nn.Sequential:
    """LN(U SiLU(D v)): [..., size] -> [..., W]."""
    down, up = nn.Linear(size, inner, bias=False), nn.Linear(inner, width, bias=False)
    for layer in (down, up):
        nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(down, nn.SiLU(), up, nn.LayerNorm(width))


@dataclass(frozen=True)
class Cached:
    """What a gate reads of B examples; it does not depend on the gate, so it is computed once.

    inputs [B, H], scores [B, K, O], words [B, C]: which of the O scores are those of the label words. choice [B].
    """

    inputs: Tensor
    scores: Tensor
    words: Tensor
    choice: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __add__(self, other: Cached) -> Cached:
        return Cached(*(torch.cat([getattr(self, n), getattr(other, n)]) for n in vars(self)))

    def select(self, index: Sequence[int]) -> Cached:
        """Examples in this order."""
        return Cached(*(getattr(self, n)[list(index)] for n in vars(self)))

    def mixture(self, weights: Tensor) -> Tensor:
        """weights [B, K] -> scores of the label words [B, C]."""
        return (weights[:, :, None] * self.scores).sum(dim=1).gather(1, self.words)


def from_answers(
    backbone: Backbone, answers: Answers, examples: Sequence[Example], settings: GateSettings
) -> Cached:
    """The scores of the label words, as they were asked for already."""
    count = _alike(examples)
    if answers.scores is None:
        raise PromptError(
            "a gate mixes scores, and these answers are free text: it needs a task with label words"
        )
    scores = torch.tensor(answers.scores, dtype=torch.float32).transpose(0, 1)  # [B, K, C]
    words = torch.arange(count).expand(len(examples), count)  # [B, C]
    return _cached(backbone, examples, settings, scores, words)


def from_vocabulary(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    examples: Sequence[Example],
    settings: GateSettings,
    batch: int,
) -> Cached:
    """log p(first written token | prompt, input) over the vocabulary; label words must begin with different pieces."""
    if isinstance(backbone, EncoderBackbone):
        raise PromptError('an encoder has no vocabulary to write from: set space = "words"')
    count = _alike(examples)
    encoded = [question(backbone, e, room=max(p.length for p in prompts)) for e in examples]
    firsts = [[question(backbone, e, answer=c).target_ids[0] for c in e.choices] for e in examples]
    if any(len(set(row)) < count for row in firsts):
        raise DataError(
            f"the label words {', '.join(map(repr, examples[0].choices))} do not begin with different pieces, so one "
            'written token does not tell them apart: set space = "words", or choose other label words'
        )
    rows = [(i, k) for i in range(len(examples)) for k in range(len(prompts))]
    parts = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        ready = collate([encoded[i] for i, _ in part], [k for _, k in part], pad_id=backbone.pad_id)
        ready = ready.to(backbone.device)
        with torch.no_grad():
            parts.append(backbone.next_token(ready, stacked(prompts, ready.rows)).float().cpu())  # type: ignore[attr-defined]
    scores = torch.cat(parts).view(len(examples), len(prompts), -1)  # [B, K, V]
    return _cached(backbone, examples, settings, scores, torch.tensor(firsts))


def from_ids(
    backbone: Backbone, ids: Sequence[int], scores: Tensor, words: Tensor, settings: GateSettings
) -> Cached:
    """One sample by the ids of its input, as the sources scored it: scores [K, O], words [C]."""
    inputs = _pooled(backbone, ids, settings.pool)[None]
    return Cached(inputs, _scaled(scores[None], settings), words[None], torch.tensor([-1]))


def _cached(
    backbone: Backbone, examples: Sequence[Example], settings: GateSettings, scores: Tensor, words: Tensor
) -> Cached:
    choice = torch.tensor([-1 if e.choice is None else e.choice for e in examples])
    inputs = pooled(backbone, examples, settings.pool)
    return Cached(inputs, _scaled(scores, settings), words, choice)


def _scaled(scores: Tensor, settings: GateSettings) -> Tensor:
    return scores.log_softmax(dim=2) if settings.log_probabilities else scores


def pooled(backbone: Backbone, examples: Sequence[Example], pool: str) -> Tensor:
    """Max (or mean) over the embeddings of the input's tokens, prompt and padding left out: [B, H] float32."""
    found = []
    for example in examples:
        ids = question(backbone, example).input_ids
        if not ids:
            raise DataError(f"{example.source or 'an example'} has no input to weigh the sources by")
        found.append(_pooled(backbone, ids, pool))
    return torch.stack(found)


def _pooled(backbone: Backbone, ids: Sequence[int], pool: str) -> Tensor:
    with torch.no_grad():
        table = backbone.embed(ids).float()  # [T, H]
        return (table.amax(dim=0) if pool == "max" else table.mean(dim=0)).cpu()


def _alike(examples: Sequence[Example]) -> int:
    """C; DataError unless all examples choose among the same words."""
    if not examples or not examples[0].choices:
        raise DataError("a gate mixes the scores of label words, and this task has none")
    if any(e.choices != examples[0].choices for e in examples):
        raise DataError(
            "a gate reads the scores of fixed label words; each example of this task has its own choices"
        )
    return len(examples[0].choices)


def gated(gate: Gate, cached: Cached, examples: Sequence[Example]) -> list[Prediction]:
    """One Prediction for each example by the gate's weights."""
    gate.eval()
    with torch.no_grad():
        totals = cached.mixture(gate(cached.inputs, cached.scores))
    return [ranked(e, row) for e, row in zip(examples, totals.tolist(), strict=True)]


def controls(gate: Gate, cached: Cached, seed: int = 0) -> dict[str, float]:
    """Accuracy with the right pairing and without: what is left when weights cannot follow the sample.

    sesom: as it is. inputs_shuffled, scores_shuffled: the gate reads another sample's input, or scores; the mixture
    is of the right scores. mean_weights: every sample gets the average weights. uniform: 1/K. entropy: of the weights,
    in nats (log K at most).
    """
    generator = torch.Generator().manual_seed(seed)
    other = torch.randperm(len(cached), generator=generator)

    def accuracy(weights: Tensor) -> float:
        return float((cached.mixture(weights).argmax(dim=1) == cached.choice).double().mean())

    gate.eval()
    with torch.no_grad():
        own = gate(cached.inputs, cached.scores)  # [B, K]
        entropy = -(own * own.clamp_min(1e-12).log()).sum(dim=1).mean()
        return {
            "sesom": accuracy(own),
            "inputs_shuffled": accuracy(gate(cached.inputs[other], cached.scores)),
            "scores_shuffled": accuracy(gate(cached.inputs, cached.scores[other])),
            "mean_weights": accuracy(own.mean(dim=0).expand_as(own)),
            "uniform": accuracy(torch.full_like(own, 1 / own.shape[1])),
            "entropy": float(entropy),
        }
