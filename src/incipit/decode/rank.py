"""p(c) = softmax_c log p(label word c | prompt, input): classification by scoring the label words.

# B batch, K prompts, C candidates, V vocabulary
Brown et al. 2020 call it rank classification. A candidate's score is the sum over its tokens; the end token is
scored with it only where one candidate's tokens begin another's ("no", "no idea").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from incipit.backbones import Backbone, EncoderBackbone
from incipit.batch import Batch, Encoded, collate
from incipit.encode import questions
from incipit.errors import DataError, PromptError
from incipit.injection import Injection
from incipit.prompts import Prompt
from incipit.tasks.example import Example


def rank(
    backbone: Backbone,
    prompts: Sequence[Prompt | None],
    examples: Sequence[Example],
    rows: Sequence[int],
    rooms: Sequence[int],
) -> list[list[float]]:
    """Shares of each example's choices, in their order; row i is read by prompts[rows[i]]."""
    logs = log_scores(backbone, prompts, examples, rows, rooms)
    return [torch.tensor(one).softmax(dim=0).tolist() for one in logs]


def log_scores(
    backbone: Backbone,
    prompts: Sequence[Prompt | None],
    examples: Sequence[Example],
    rows: Sequence[int],
    rooms: Sequence[int],
    known: dict[tuple[int, int], list[Encoded]] | None = None,
) -> list[list[float]]:
    """log p(choice | prompt, input) of each example's choices, in their order: `rank` before its softmax.

    known: token ids of examples that were asked before, by id(example) and room; to be kept by the caller.
    """
    known = {} if known is None else known
    for e, room in zip(examples, rooms, strict=True):
        if (id(e), room) not in known:
            known[id(e), room] = candidates(backbone, e, room)
    each = [known[id(e), room] for e, room in zip(examples, rooms, strict=True)]
    if all(c.input_ids == cs[0].input_ids for cs in each for c in cs):
        asked, readers = [cs[0] for cs in each], list(rows)
        ends = [[c.target_ids for c in cs] for cs in each]
    else:  # a tokenizer that joins the last word of an input and a label: every candidate has its own input
        asked = [c for cs in each for c in cs]
        readers = [row for cs, row in zip(each, rows, strict=True) for _ in cs]
        ends = [[c.target_ids] for c in asked]
    batch = collate(asked, readers, pad_id=backbone.pad_id).to(backbone.device)
    flat = [log for logs in backbone.choices(batch, stacked(prompts, batch.rows), ends) for log in logs]
    found = iter(flat)
    return [[next(found) for _ in cs] for cs in each]


def class_scores(
    backbone: EncoderBackbone, batch: Batch, prompts: Sequence[Prompt | None], examples: Sequence[Example]
) -> list[list[float]]:
    """An encoder's class scores before the softmax; each prompt's read-out must have as many classes as the example
    has choices."""
    injection = stacked(prompts, batch.rows)
    logits = backbone.class_logits(batch, injection)  # [B, C]
    assert injection is not None and injection.readout is not None
    classes = injection.readout.live.sum(dim=1)[injection.rows].tolist()
    for example, count in zip(examples, classes, strict=True):
        if len(example.choices) != count:
            raise PromptError(
                f"{example.source or 'the example'} has {len(example.choices)} label words, the prompt was "
                f"trained for {count}: use the task that the prompt belongs to"
            )
    return [row[:count] for row, count in zip(logits.float().tolist(), classes, strict=True)]


def candidates(backbone: Backbone, example: Example, room: int) -> list[Encoded]:
    """Each choice of an example behind its input, as token ids; the end token is scored where it must be."""
    if not example.choices:
        raise DataError(
            f'{example.source or "an example"} has no choices to rank: set decode.mode = "generate"'
        )
    found = questions(backbone, example, example.choices, room=room)
    ids = [c.target_ids for c in found]
    if any(a != b and b[: len(a)] == a for a in ids for b in ids) or len(set(ids)) < len(ids):
        found = questions(backbone, example, example.choices, room=room, end=True)
    return found


def stacked(prompts: Sequence[Prompt | None], rows: torch.Tensor) -> Injection | None:
    """The Injection of K prompts for rows [B] of a batch; None when there is no prompt at all."""
    parts = [p.injection() for p in prompts if p is not None]
    if not parts:
        return None
    if len(parts) != len(prompts):
        raise PromptError("a batch cannot mix prompts and no prompt: give the promptless rows an empty frame")
    return Injection.stack(parts, rows)
