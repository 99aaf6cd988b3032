"""A prompt that learns what a teacher's prompt makes the same model say.

# B batch, K tasks, C label words, H hidden, S slots
Wang et al. 2023, "Multitask prompt tuning", section 3.2: L = L_PLM + lambda (L_logits + L_hidden), lambda = 0.9, the
teachers being prompts that were tuned on each task alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from incipit.backbones import Backbone, EncoderBackbone, EncoderDecoderBackbone
from incipit.batch import IGNORE, Batch, pad
from incipit.decode import stacked
from incipit.decode.rank import candidates
from incipit.errors import DataError, PromptError
from incipit.prompts import Prompt
from incipit.tasks.example import Example
from incipit.train.gradients import Objective

LAMBDA = 0.9


@dataclass(frozen=True)
class Lesson:
    """What one task's student learns from. words: token ids of its label words, [] for an encoder."""

    teacher: Prompt
    words: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, backbone: Backbone, teacher: Prompt, examples: Sequence[Example]) -> Lesson:
        """A teacher of a task whose examples all choose among the same words. Raises DataError where they do not."""
        if not examples or not examples[0].choices or any(e.choices != examples[0].choices for e in examples):
            raise DataError(
                "a teacher is followed over fixed label words, and this task has none that all examples share: "
                "train it without a teacher"
            )
        for parameter in teacher.parameters():
            parameter.requires_grad_(False)
        if isinstance(backbone, EncoderBackbone):
            return cls(teacher.eval())
        ends = tuple(c.target_ids for c in candidates(backbone, examples[0], teacher.length))
        return cls(teacher.eval(), ends)


def distilled(
    objective: Objective,
    backbone: Backbone,
    students: Sequence[Prompt],
    lessons: Sequence[Lesson],
    weight: float = LAMBDA,
    hidden: bool = True,
) -> Objective:
    """nll + weight (KL(teacher || student) + |h_student - h_teacher|^2 / H) of each row: an Objective for the one loop.

    The distributions are those of the task's label words, which is what answers are chosen from; in the paper they are
    of the vocabulary at the target's tokens. h: what an encoder's read-out gets, or an encoder-decoder's encoder states
    (mean over slots). Every row carries the term times its label tokens, so a step's mean over tokens holds it once.
    Raises PromptError for lessons that are not one a student, and where `hidden` cannot be had.
    """
    if len(students) != len(lessons):
        raise PromptError(f"{len(lessons)} teachers for {len(students)} students: give each task its own")
    if not weight:
        return objective
    teachers: list[Prompt | None] = [lesson.teacher for lesson in lessons]
    if hidden and not isinstance(backbone, EncoderBackbone | EncoderDecoderBackbone):
        raise PromptError(
            f"backbone {backbone.name!r} is causal, and its hidden states are not compared: set hidden = False"
        )
    lengths = [(s.length, lesson.teacher.length) for s, lesson in zip(students, lessons, strict=True)]
    if hidden and isinstance(backbone, EncoderDecoderBackbone) and any(a != b for a, b in lengths):
        raise PromptError(
            f"students and teachers of (length, length) {lengths}: their states do not correspond"
        )

    def nll(batch: Batch) -> tuple[Tensor, Tensor]:
        total, count = objective(batch)
        mine, states = _said(backbone, batch, students, lessons, hidden)
        with torch.no_grad():
            theirs, wanted = _said(backbone, batch, teachers, lessons, hidden)
        # label words that a task does not have: -inf on both sides
        known = theirs != -torch.inf
        apart = (theirs.exp() * (theirs - mine)).masked_fill(~known, 0.0).sum(dim=1)  # [B]
        if states is not None and wanted is not None:
            apart = apart + (states - wanted).square().mean(dim=-1)
        return total + weight * count.to(total) * apart.to(total), count

    return nll


def _said(
    backbone: Backbone,
    batch: Batch,
    prompts: Sequence[Prompt | None],
    lessons: Sequence[Lesson],
    hidden: bool,
) -> tuple[Tensor, Tensor | None]:
    """(log p of the label words [B, C], a state of each row [B, H] or None); -inf where a task has fewer words."""
    used, rows = batch.rows.unique(return_inverse=True)
    injection: Any = stacked([prompts[k] for k in used.tolist()], rows)
    here = replace(batch, rows=rows)
    if isinstance(backbone, EncoderBackbone):
        at, placed = backbone.at(here, injection)
        assert placed is not None and placed.readout is not None
        features = backbone.pooled(at, placed, placed.readout.pool).float()  # [B, H]
        logs = backbone.classed(features, placed).log_softmax(dim=1)
        return logs, features if hidden else None
    logs = _ranked(backbone, here, injection, [lessons[k].words for k in batch.rows.tolist()])
    if not hidden:
        return logs, None
    assert isinstance(backbone, EncoderDecoderBackbone)
    states, mask = backbone.read(*backbone.at(here, injection))
    live = mask[..., None].float()  # [B, S, 1]
    return logs, (states.float() * live).sum(dim=1) / live.sum(dim=1).clamp_min(1)


def _ranked(
    backbone: Backbone, batch: Batch, injection: Any, words: Sequence[Sequence[Sequence[int]]]
) -> Tensor:
    """log softmax over a row's own label words of log p(word | input), differentiable: [B, C]."""
    which = [i for i, own in enumerate(words) for _ in own]
    ids, mask = pad([word for own in words for word in own], backbone.pad_id)
    there = batch.select(torch.tensor(which, device=batch.rows.device))
    labels = torch.where(mask, ids, IGNORE)
    part = replace(there, target_ids=ids, target_mask=mask, labels=labels)
    each = -backbone.loss(part, injection)[0]  # [sum of the rows' words]
    pieces = iter(each.split([len(own) for own in words]))
    most = max(map(len, words))
    return torch.stack([
        F.pad(piece.log_softmax(dim=0), (0, most - len(piece)), value=-torch.inf) for piece in pieces
    ])  # fmt: skip
