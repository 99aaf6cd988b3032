"""A gate trained on few shots, on the one loop: rows are places in what was computed of the sources already."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from incipit import files
from incipit.batch import Batch, Encoded, collate
from incipit.ensemble.sesom import Cached, Gate, GateSettings
from incipit.errors import DataError
from incipit.train import ExampleStream, FitSettings, OptimSettings, Outcome, Trainee, fit


def fit_gates(
    gates: Sequence[GateSettings],
    shots: Cached,
    dev: Cached | None = None,
    *,
    steps: int = 200,
    lr: float = 0.01,
    weight_decay: float = 0.01,
    batch: int = 32,
    folder: files.PathLike = "",
    show: bool = False,
) -> list[tuple[Gate, Outcome]]:
    """Train gates on the same shots, all of one step together: loss = CE(softmax(sum_j a_j l_j), y), gate alone.

    Source prompts and model are no part of it, so a step costs next to nothing. dev: chooses the best step by
    accuracy, where there is one. AdamW at an absolute rate. Raises DataError for no shots.
    """
    if not len(shots):
        raise DataError(
            "no shots to learn the weights from: the task's train split is empty; raise task.shots"
        )
    if int(shots.choice.min()) < 0:
        raise DataError("a shot has no label: the weights are learned from labelled examples")
    made = [Gate(one, shots.inputs.shape[1], shots.scores.shape[2], shots.scores.shape[1]) for one in gates]
    choices = shots.choice.tolist()

    def row(place: int) -> Encoded:
        return Encoded((place,), choice=choices[place])

    trainees = [
        Trainee(f"gate-{k}", gate, ExampleStream(range(len(shots)), row, seed=gate.settings.seed))
        for k, gate in enumerate(made)
    ]

    def nll(asked: Batch) -> tuple[Tensor, Tensor]:
        """A batch mixes the rows of all gates; each reads its own."""
        total = torch.zeros(len(asked))
        for k in asked.rows.unique().tolist():
            mine = (asked.rows == k).nonzero()[:, 0]
            part = shots.select(asked.input_ids[mine, 0].tolist())
            mixed = part.mixture(made[k](part.inputs, part.scores))  # [M, C]
            total = total.index_put((mine,), F.cross_entropy(mixed, part.choice, reduction="none"))
        return total, torch.ones(len(asked), dtype=torch.int64)

    def judge(live: Sequence[int]) -> dict[int, dict[str, float]]:
        if dev is None:
            return {}
        return {k: {"accuracy": _accuracy(made[k], dev)} for k in live}

    def joined(encoded: Sequence[Encoded], rows: Sequence[int]) -> Batch:
        return collate(encoded, rows)

    settings = FitSettings(
        steps=steps, batch=min(batch, len(shots)), eval_every=max(1, steps // 20), show=show,
        optim=OptimSettings(name="adamw", lr=lr, weight_decay=weight_decay),
    )  # fmt: skip
    if str(folder):
        outcomes = fit(trainees, nll, settings, folder, joined, evaluate=judge)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            outcomes = fit(trainees, nll, settings, scratch, joined, evaluate=judge)
    return [(gate.eval(), outcome) for gate, outcome in zip(made, outcomes, strict=True)]


def _accuracy(gate: Gate, dev: Cached) -> float:
    mixed = dev.mixture(gate(dev.inputs, dev.scores))
    return float((mixed.argmax(dim=1) == dev.choice).double().mean())
