"""Who is trained and how: FitSettings, Trainee, Outcome, and the Runner that keeps one trainee's state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from incipit.errors import TrainingError, nearest
from incipit.train.checkpoint import State
from incipit.train.optim import Optimiser, OptimSettings
from incipit.train.stream import Stream

POINTS = 64  # of a curve that is kept with what was trained
REMEDY = "Try a smaller lr, clip_norm = 1, or float32; the last checkpoint is from before this step"


@dataclass(frozen=True)
class FitSettings:
    """How long, how large, how fast, how often; the fields below `log_every` change no result."""

    steps: int
    """Optimiser steps."""
    batch: int = 32
    """Rows of each trainee a step."""
    optim: OptimSettings = field(default_factory=OptimSettings)
    clip_norm: float = 0.0
    """Greatest norm of a trainee's gradient; 0: no limit."""
    precision: str = "float32"
    """What the forward pass is computed in: "float32", or "bfloat16" where the hardware multiplies it."""
    eval_every: int = 0
    """Steps between scores on validation; the last step is always scored."""
    best: str = "max"  # whether THE metric is better when greater ("max") or smaller ("min")
    keep_best: bool = True
    """End with the best tensors, not the last."""
    patience: int = 0
    """Scores without a better one before a trainee stops; 0: never."""
    log_every: int = 10
    """Steps between records of the loss."""
    micro_batch: int = 0
    """Rows of one forward pass; 0: rows of like length together."""
    slots: int = 0  # most tokens of one forward pass, padding counted; 0: no limit
    more: int = 0  # slots that each row has besides its own tokens
    waste: float = 1.25  # padded over real size at which rows are cut; 0: rows are not padded
    save_every: int = 0
    """Steps between checkpoints; 0: at the end only."""
    save_minutes: float = 0.0
    """Minutes between checkpoints; 0: never."""
    show: bool = True
    """A line of progress on stderr."""
    tensorboard: bool = False
    """Also write curves for TensorBoard."""

    def __post_init__(self) -> None:
        for value, known in ((self.precision, ("float32", "bfloat16")), (self.best, ("max", "min"))):
            if value not in known:
                raise TrainingError(f"unknown precision or direction {value!r}{nearest(value, known)}")
        if self.steps < 1 or self.batch < 1 or self.log_every < 1:
            raise TrainingError(
                f"steps {self.steps}, batch {self.batch}, log_every {self.log_every}: all must be >= 1"
            )


# Settings that change no result and may differ between the parts of a run.
FREE = (
    *("micro_batch", "memory", "checkpointing", "slots", "more", "waste"),
    *("save_every", "save_minutes", "show", "tensorboard"),
)


@dataclass
class Trainee:
    """What is trained: the parameters of `module` that require a gradient, on the rows of `stream`."""

    name: str
    module: nn.Module
    stream: Stream
    units: Mapping[str, float] = field(default_factory=dict)  # learning-rate unit by parameter name
    lr: float | None = None  # instead of the settings' lr
    match: float | None = None  # keep the tensors whose score is nearest to this, not the best


@dataclass
class Outcome:
    """How a trainee fared: its best step and the scores there (its module holds that step, or the last one without
    `keep_best`), and every evaluation."""

    name: str
    steps: int  # steps it was trained, fewer than asked when it stopped early
    best_step: int
    best_score: float | None
    scores: dict[str, float]
    history: list[dict[str, Any]]

    def curve(self) -> dict[str, Any]:
        """THE metric on the dev split by step, at most POINTS of it, the best and the last among them; {} without any.

        {"metric": name, "steps": [...], "scores": [...], "best": step}
        """
        names = [name for row in self.history[:1] for name in row if name != "step"]
        rows = [row for row in self.history if names and math.isfinite(row[names[0]])]
        if not rows:
            return {}
        stride = -(-len(rows) // (POINTS - 2))
        kept = [
            row
            for i, row in enumerate(rows)
            if i % stride == 0 or i == len(rows) - 1 or row["step"] == self.best_step
        ]
        scores = [float(row[names[0]]) for row in kept]
        return {
            "metric": names[0],
            "steps": [row["step"] for row in kept],
            "scores": scores,
            "best": self.best_step,
        }


class Runner:
    """A trainee with its optimiser and its record of scores."""

    def __init__(self, trainee: Trainee, settings: FitSettings) -> None:
        self.trainee, self.settings = trainee, settings
        self.params = {n: p for n, p in trainee.module.named_parameters() if p.requires_grad}
        if not self.params:
            raise TrainingError(
                f"trainee {trainee.name!r} has no parameter that requires a gradient: nothing to train"
            )
        self.optimiser = Optimiser(self.params, settings.optim, trainee.units, trainee.lr)
        self.best: dict[str, Tensor] = {}
        self.plain: dict[str, Any] = {  # all JSON: what a checkpoint keeps besides tensors
            **{"steps": 0, "stopped": False, "history": []},
            **{"best_step": 0, "best_score": None, "scores": {}, "stale": 0},
            **{"nll": 0.0, "count": 0.0},  # since the last record of the loss
        }

    @property
    def stopped(self) -> bool:
        """Whether its patience has ended."""
        return bool(self.plain["stopped"])

    def update(self, step: int, nll: float, count: float, bad: Sequence[str]) -> float:
        """One optimiser step from summed gradients; returns the rate. bad: rows without a finite loss."""
        name, grads = self.trainee.name, [p.grad for p in self.params.values() if p.grad is not None]
        if not math.isfinite(nll):
            rows = f" (rows {', '.join(bad[:8])})" if bad else ""
            raise TrainingError(f"the loss of trainee {name!r} is not finite at step {step}{rows}. {REMEDY}")
        for grad in grads:
            grad /= max(count, 1.0)
        norm = float(nn.utils.get_total_norm(grads))
        if not math.isfinite(norm):
            raise TrainingError(f"the gradient of trainee {name!r} is not finite at step {step}. {REMEDY}")
        if 0 < self.settings.clip_norm < norm:
            for grad in grads:
                grad *= self.settings.clip_norm / norm
        rate = self.optimiser.step(step, self.settings.steps)
        self.trainee.module.zero_grad(set_to_none=True)
        self.plain["steps"] = step
        self.plain["nll"] += nll
        self.plain["count"] += count
        return rate

    def window_loss(self) -> float:
        """Mean loss of a label token since the last call."""
        loss = float(self.plain["nll"]) / max(1.0, float(self.plain["count"]))
        self.plain["nll"] = self.plain["count"] = 0.0
        return loss

    def judge(self, step: int, scores: dict[str, float]) -> bool:
        """Note the scores; keep the tensors when THE metric is the best so far; stop when patience ends."""
        plain, score = self.plain, next(iter(scores.values()))
        before = plain["best_score"]
        better = before is None or math.isnan(before) or self._order(score) > self._order(before)
        plain["history"].append({"step": step, **scores})
        plain["stale"] = 0 if better else plain["stale"] + 1
        if better:
            plain.update(best_step=step, best_score=score, scores=dict(scores))
            if self.settings.keep_best:
                self.best = {n: p.detach().clone() for n, p in self.params.items()}
        plain["stopped"] = bool(self.settings.patience) and plain["stale"] >= self.settings.patience
        return better

    def _order(self, score: float) -> float:
        """Greater for a better score, or for one nearer to what is to be matched."""
        if self.trainee.match is not None:
            return -abs(score - self.trainee.match)
        return score if self.settings.best == "max" else -score

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the trained parameters."""
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(tensors[name])

    def outcome(self) -> Outcome:
        """The end of the run; the module holds the best tensors from here on."""
        if self.best:
            self.load(self.best)
        plain = self.plain
        best_step = plain["best_step"] or plain["steps"]
        return Outcome(
            self.trainee.name,
            plain["steps"],
            best_step,
            plain["best_score"],
            plain["scores"],
            plain["history"],
        )

    def store(self, state: State) -> None:
        """Put everything into a checkpoint."""
        name = self.trainee.name
        state.put({n: p.detach() for n, p in self.params.items()}, "trained", name)
        state.put(self.optimiser.state(), "optimiser", name)
        state.put(self.best, "best", name)
        state.trainees[name] = {"plain": self.plain, "stream": self.trainee.stream.state()}

    def restore(self, state: State) -> None:
        """Take everything from a checkpoint."""
        name = self.trainee.name
        self.load(state.group("trained", name))
        self.optimiser.restore(state.group("optimiser", name))
        device = next(iter(self.params.values())).device
        self.best = {n: t.to(device) for n, t in state.group("best", name).items()}
        self.plain = state.trainees[name]["plain"]
        self.trainee.stream.restore(state.trainees[name]["stream"])
