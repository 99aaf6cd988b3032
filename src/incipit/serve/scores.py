"""Requests that choose: their candidates' log-probabilities, whatever their prompts, in as few passes as possible.

# B rows, K prompts, C candidates
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from incipit.backbones import Backbone, EncoderBackbone
from incipit.batch import Encoded, collate
from incipit.errors import IncipitError
from incipit.injection import Injection
from incipit.serve.asks import Ask, Choose
from incipit.serve.executor import Scored
from incipit.serve.prefixes import Prefixes
from incipit.serve.sampling import NOT_FINITE


@torch.no_grad()
def scored(
    backbone: Backbone, prefixes: Prefixes, asks: Sequence[Ask], *, together: bool = True
) -> list[Scored]:
    """log p of each ask's candidates. Rows that enter the model alike share a pass; a faulty one fails alone."""
    found: dict[int, Scored] = {}
    prompts: dict[int, Injection | None] = {}
    held: list[str] = []
    for i, ask in enumerate(asks):
        try:
            prompts[i] = prefixes.take(ask.version) if ask.version is not None else None
        except IncipitError as error:
            found[i] = Scored(error=str(error))
            continue
        if ask.version is not None:
            held.append(ask.version.id)
    there = list(prompts)
    groups = alike(list(prompts.values())) if together else [[n] for n in range(len(there))]
    for group in groups:
        found |= _all(backbone, asks, prompts, [there[n] for n in group])
    for name in held:
        prefixes.give(name)
    return [found[i] for i in range(len(asks))]


def _all(
    backbone: Backbone, asks: Sequence[Ask], prompts: dict[int, Injection | None], index: list[int]
) -> dict[int, Scored]:
    """Score rows in one pass; where that fails, one by one, so that the fault stays with who has it."""
    try:
        logs = _logs(backbone, [asks[i] for i in index], [prompts[i] for i in index])
    except IncipitError as error:
        if len(index) == 1:
            return {index[0]: Scored(error=str(error))}
        return {k: v for i in index for k, v in _all(backbone, asks, prompts, [i]).items()}
    return {
        i: Scored(tuple(row)) if bool(torch.isfinite(torch.tensor(row)).all()) else Scored(error=NOT_FINITE)
        for i, row in zip(index, logs, strict=True)
    }


def _logs(backbone: Backbone, asks: Sequence[Ask], prompts: Sequence[Injection | None]) -> list[list[float]]:
    rows: list[int] = []
    read: list[Encoded] = []
    ends: list[list[tuple[int, ...]]] = []
    parts: dict[int, int] = {}  # id(prompt) -> its place among the distinct ones
    distinct: list[Injection] = []
    for ask, prompt in zip(asks, prompts, strict=True):
        assert isinstance(ask.do, Choose)
        if prompt is not None and id(prompt) not in parts:
            parts[id(prompt)] = len(distinct)
            distinct.append(prompt)
        each = [(i, [e]) for i, e in zip(ask.do.inputs, ask.do.ends, strict=True)] if ask.do.inputs else None
        for ids, some in each or [(ask.ids, list(ask.do.ends))]:
            rows.append(parts[id(prompt)] if prompt is not None else 0)
            read.append(Encoded(ids))
            ends.append(some)
    batch = collate(read, rows, pad_id=backbone.pad_id).to(backbone.device)
    injection = Injection.stack(distinct, batch.rows) if distinct else None
    if isinstance(backbone, EncoderBackbone):
        logits = backbone.class_logits(batch, injection).double().log_softmax(dim=-1).tolist()
        return [row[: len(ask.do.ends)] for row, ask in zip(logits, asks, strict=True)]  # type: ignore[union-attr]
    flat = iter([log for row in backbone.choices(batch, injection, ends) for log in row])
    return [[next(flat) for _ in ask.do.ends] for ask in asks]  # type: ignore[union-attr]


def alike(prompts: Sequence[Injection | None]) -> list[list[int]]:
    """Indices of prompts that enter the model at the same places in the same way, so that their rows share a pass."""
    ways: dict[object, list[int]] = {}
    for i, prompt in enumerate(prompts):
        ways.setdefault(_way(prompt), []).append(i)
    return list(ways.values())


def _way(prompt: Injection | None) -> object:
    if prompt is None:
        return None
    way = prompt.readout.way() if prompt.readout is not None else None
    return prompt.inputs is None, frozenset(prompt.keys), prompt.isolated, way
