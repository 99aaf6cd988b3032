"""Requests that choose: their candidates' log-probabilities, whatever their prompts, in as few passes as possible.

# B rows, K prompts, C candidates, V vocabulary
A request of an ensemble is a row for each member, beside those of all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from incipit.backbones import Backbone, EncoderBackbone
from incipit.batch import Batch, Encoded, collate
from incipit.errors import IncipitError
from incipit.injection import Injection
from incipit.serve.asks import Ask, Choose
from incipit.serve.executor import Scored
from incipit.serve.prefixes import Prefixes
from incipit.serve.sampling import NOT_FINITE

Scores: TypeAlias = (
    "list[float] | Tensor"  # of a row's candidates; or of the vocabulary [V], for a wide ensemble
)


@dataclass(frozen=True)
class _Row:
    """A request as one prompt reads it. wide: its first written token is scored over the vocabulary."""

    ask: Ask
    wide: bool


@torch.no_grad()
def scored(
    backbone: Backbone, prefixes: Prefixes, asks: Sequence[Ask], *, together: bool = True
) -> list[Scored]:
    """log p of each ask's candidates. Rows that enter the model alike share a pass; a faulty one fails alone."""
    rows: list[_Row] = []
    spans: list[range] = []  # of each ask among the rows
    for ask in asks:
        panel = ask.version.panel if ask.version is not None else None
        mine = [_Row(replace(ask, version=m), panel.wide) for m in panel.members] if panel else None
        spans.append(range(len(rows), len(rows) + len(mine or [ask])))
        rows += mine or [_Row(ask, False)]
    found = _read(backbone, prefixes, rows, together)
    return [_one(backbone, ask, [found[i] for i in span]) for ask, span in zip(asks, spans, strict=True)]


def _one(backbone: Backbone, ask: Ask, found: Sequence[Scores | str]) -> Scored:
    """What a request gets of its rows' scores, or of what is wrong with one of them."""
    for one in found:
        if isinstance(one, str):
            return Scored(error=one)
    scores = [one for one in found if not isinstance(one, str)]
    panel = ask.version.panel if ask.version is not None else None
    if panel is not None:
        return panel.scored(backbone, ask, scores)
    (own,) = scores
    logs = torch.as_tensor(own, dtype=torch.float64)
    logs = logs.log_softmax(dim=-1) if isinstance(backbone, EncoderBackbone) else logs
    return Scored(tuple(logs.tolist()))


def _read(backbone: Backbone, prefixes: Prefixes, rows: Sequence[_Row], together: bool) -> list[Scores | str]:
    """Scores of each row, or the reason why it has none."""
    found: dict[int, Scores | str] = {}
    prompts: dict[int, Injection | None] = {}
    held: list[str] = []
    for i, row in enumerate(rows):
        version = row.ask.version
        try:
            prompts[i] = prefixes.take(version) if version is not None else None
        except IncipitError as error:
            found[i] = str(error)
            continue
        if version is not None:
            held.append(version.id)
    for wide in (False, True):
        there = [i for i in prompts if rows[i].wide == wide]
        groups = alike([prompts[i] for i in there]) if together else [[n] for n in range(len(there))]
        for group in groups:
            found |= _all(backbone, rows, prompts, [there[n] for n in group])
    for name in held:
        prefixes.give(name)
    return [found[i] for i in range(len(rows))]


def _all(
    backbone: Backbone, rows: Sequence[_Row], prompts: dict[int, Injection | None], index: list[int]
) -> dict[int, Scores | str]:
    """Score rows in one pass; where that fails, one by one, so that the fault stays with who has it."""
    try:
        read = _vocabulary if rows[index[0]].wide else _candidates
        scores = read(backbone, [rows[i].ask for i in index], [prompts[i] for i in index])
    except IncipitError as error:
        if len(index) == 1:
            return {index[0]: str(error)}
        return {k: v for i in index for k, v in _all(backbone, rows, prompts, [i]).items()}
    return {
        i: row if bool(torch.isfinite(torch.as_tensor(row)).all()) else NOT_FINITE
        for i, row in zip(index, scores, strict=True)
    }


def _candidates(backbone: Backbone, asks: Sequence[Ask], prompts: Sequence[Injection | None]) -> list[Scores]:
    """Of a generative backbone log-probabilities, of an encoder the logits of its read-out; C for each row."""
    read: list[list[tuple[int, ...]]] = []
    ends: list[list[tuple[int, ...]]] = []
    for ask in asks:
        assert isinstance(ask.do, Choose)
        if ask.do.inputs:
            read.append(list(ask.do.inputs))
            ends += [[end] for end in ask.do.ends]
        else:
            read.append([ask.ids])
            ends.append(list(ask.do.ends))
    batch, injection = _batch(backbone, read, prompts)
    if isinstance(backbone, EncoderBackbone):
        logits = backbone.class_logits(batch, injection).tolist()
        return [row[: len(ask.do.ends)] for row, ask in zip(logits, asks, strict=True)]  # type: ignore[union-attr]
    flat = iter([log for row in backbone.choices(batch, injection, ends) for log in row])
    return [[next(flat) for _ in ask.do.ends] for ask in asks]  # type: ignore[union-attr]


def _vocabulary(backbone: Backbone, asks: Sequence[Ask], prompts: Sequence[Injection | None]) -> list[Scores]:
    """log p of each piece [V] at the first written position, for each row."""
    batch, injection = _batch(backbone, [[ask.ids] for ask in asks], prompts)
    logs: Tensor = backbone.next_token(batch, injection)  # type: ignore[attr-defined]
    return list(logs.float().cpu())


def _batch(
    backbone: Backbone, read: Sequence[Sequence[tuple[int, ...]]], prompts: Sequence[Injection | None]
) -> tuple[Batch, Injection | None]:
    """What each row reads, once or before each candidate, behind its prompt; each distinct prompt stands once."""
    parts: dict[int, int] = {}  # id(prompt) -> its place among the distinct ones
    distinct: list[Injection] = []
    rows: list[int] = []
    for inputs, prompt in zip(read, prompts, strict=True):
        if prompt is not None and id(prompt) not in parts:
            parts[id(prompt)] = len(distinct)
            distinct.append(prompt)
        rows += [parts[id(prompt)] if prompt is not None else 0] * len(inputs)
    encoded = [Encoded(ids) for inputs in read for ids in inputs]
    batch = collate(encoded, rows, pad_id=backbone.pad_id).to(backbone.device)
    return batch, Injection.stack(distinct, batch.rows) if distinct else None


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
    return prompt.inputs is None, frozenset(prompt.keys), prompt.isolated, prompt.within, way
