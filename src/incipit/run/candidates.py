"""Masks of one prompt, tried on validation: the candidates of a stage train as one bundle.

Ma et al. 2022 (XPrompt), sections 3.2 and 3.3, where every candidate is a training of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from incipit.prompts import Masked, Prompt
from incipit.prompts.masked import rows_within
from incipit.pruning import Scores, fitting
from incipit.recipe import PruneTable, Recipe
from incipit.run.bundle import fit_members
from incipit.run.members import Member, make_member
from incipit.run.rewind import Source, target
from incipit.tasks.metrics import METRICS
from incipit.train import Outcome

SEARCHED = ("tokens", "pieces", "grid")
Ratios = tuple[float | None, float | None]
Clock = tuple[float, float]


def clock() -> Clock:
    """(seconds that have passed, seconds that this process has computed)."""
    return time.monotonic(), time.process_time()


@dataclass(frozen=True)
class PrunedRow:
    """One prompt that was tried.

    stage: "tokens", "pieces", "grid" (candidates), "untrained" (no further training), "retrained", or "control".
    tokens, kept: rows with a number that is kept, and how many numbers. steps: of this stage's training. dev, test:
    scores; candidates are not scored on test. chosen: on validation.
    """

    stage: str
    name: str
    token_ratio: float | None
    piece_ratio: float | None
    tokens: int
    kept: int
    steps: int
    dev: dict[str, float]
    test: dict[str, float] = field(default_factory=dict)
    chosen: bool = False


@dataclass(frozen=True)
class Flags:
    """Where a run goes and how."""

    folder: Path
    resume: bool = False
    overwrite: bool = False
    show: bool = True


class Candidates:
    """The prompts that are tried for one source: `search` for the mask, `train` for any bundle of them.

    rows: what was tried, in order. cost: stage -> steps of the bundle, rows that were read forward and backward
    (rows_trained), rows that were read forward only (rows_scored), seconds, and seconds of this process's processors.
    """

    def __init__(self, source: Source, settings: PruneTable, flags: Flags) -> None:
        self.source, self.settings, self.flags = source, settings, flags
        self.rows: list[PrunedRow] = []
        task, train = source.data.task(source.recipe), source.recipe.train
        self._sign = 1 if METRICS[task.metrics[0]].higher_is_better else -1
        scored = math.ceil(train.steps / train.eval_every) * (train.eval_limit or len(task.validation))
        self.cost: dict[str, dict[str, float]] = {
            "one plain training": {
                "steps": train.steps,
                "rows_trained": train.steps * train.batch,
                "rows_scored": scored,
            }
        }

    def search(self, scores: Scores) -> tuple[float, float]:
        """The (token, piece) ratios that are best on validation; of equals the pair that keeps the fewest numbers.

        A token ratio alone is one of the candidates, for the piece ratios are tried after it.
        """
        s = self.settings
        tokens, pieces = s.token_ratios, s.piece_ratios if s.pieces > 1 else (0.0,)
        if s.search == "grid":
            return self._best("grid", scores, list(product(tokens, pieces)))
        token, _ = (
            self._best("tokens", scores, [(t, 0.0) for t in tokens]) if len(tokens) > 1 else (tokens[0], 0)
        )
        return self._best("pieces", scores, [(token, p) for p in pieces])

    def _best(self, stage: str, scores: Scores, pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
        if len(pairs) == 1:
            return pairs[0]
        recipe = self._short(len(pairs))
        start = target(self.source, self.settings, self.settings.rewind)
        prompts = {
            f"tokens {t:g}, pieces {p:g}": self.source.masked(
                fitting(scores, t, p), self.settings.removed, start
            )
            for t, p in pairs
        }
        members, outcomes = self.train(
            stage, {name: (recipe, self.source.seed, prompt) for name, prompt in prompts.items()}
        )
        for member, outcome, (t, p) in zip(members, outcomes, pairs, strict=True):
            self.note(stage, member, outcome, (t, p))
        best = max(
            (row for row in self.rows if row.stage in SEARCHED), key=lambda r: (self.value(r), -r.kept)
        )
        assert best.token_ratio is not None and best.piece_ratio is not None
        return best.token_ratio, best.piece_ratio

    def _short(self, candidates: int) -> Recipe:
        """The recipe with the steps of a candidate; without a number, all together read the rows of one training."""
        t = self.source.recipe.train
        steps = self.settings.search_steps or max(1, t.steps // candidates)
        return self.source.recipe.varied(
            {
                "train.steps": steps,
                "train.eval_every": min(t.eval_every, steps),
                "train.warmup": t.warmup * steps // t.steps,
            }
        )

    def train(
        self, stage: str, prompts: Mapping[str, tuple[Recipe, int, Prompt]]
    ) -> tuple[list[Member], list[Outcome]]:
        """Prompts by name, with their recipe and seed, as one bundle."""
        started, source, flags = clock(), self.source, self.flags
        members = [
            make_member(recipe, seed, source.data, prompt, name)
            for name, (recipe, seed, prompt) in prompts.items()
        ]
        identity = {
            "prune": self.settings.model_dump(mode="json"),
            "prompts": {name: prompt.spec() for name, (_, _, prompt) in prompts.items()},
        }
        outcomes = fit_members(
            members, source.data.backbone, flags.folder / stage, identity=identity, resume=flags.resume,
            overwrite=flags.overwrite, show=flags.show,
        )  # fmt: skip
        read = sum(o.steps for o in outcomes) * source.recipe.train.batch
        dev = len(members[0].dev.examples) if members[0].dev else 0
        scored = sum(len(o.history) for o in outcomes) * dev
        self.spent(stage, max(o.steps for o in outcomes), read, scored, started)
        return members, outcomes

    def spent(self, stage: str, steps: int, read: int, scored: int, started: Clock) -> None:
        """Note what a stage cost. of_plain: its passes over rows (one forward, one backward) in plain trainings."""
        wall, processor = clock()
        plain = self.cost["one plain training"]
        passes = (2 * read + scored) / (2 * plain["rows_trained"] + plain["rows_scored"])
        self.cost[stage] = {
            "steps": steps,
            "rows_trained": read,
            "rows_scored": scored,
            "of_plain": round(passes, 4),
            "seconds": round(wall - started[0], 2),
            "processor_seconds": round(processor - started[1], 2),
        }

    def note(
        self,
        stage: str,
        member: Member,
        outcome: Outcome,
        ratios: Ratios,
        test: Mapping[str, float] | None = None,
    ) -> None:
        """A row for what was trained."""
        assert member.prompt is not None
        self.rows.append(
            PrunedRow(
                stage, member.name, *ratios, *size(member.prompt), outcome.steps, dict(outcome.scores), dict(test or {})
            )
        )  # fmt: skip

    def value(self, row: PrunedRow) -> float:
        """THE metric on validation, greater is better."""
        score = self._sign * next(iter(row.dev.values()), -math.inf)
        return -math.inf if math.isnan(score) else score


def mask_within(prompt: Prompt) -> Masked | None:
    """The mask inside a prompt."""
    return next((part for part in prompt.modules() if isinstance(part, Masked)), None)


def size(prompt: Prompt) -> tuple[int, int]:
    """(rows with a number that is kept, numbers that are kept)."""
    found = mask_within(prompt)
    if found is not None:
        return found.tokens, found.kept
    rows = rows_within(prompt.bake())
    return rows.length, rows.length * rows.width
