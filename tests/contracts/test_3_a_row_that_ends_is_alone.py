"""Rows that end at different steps write what each writes by itself, and what transformers' `generate` writes."""

from typing import Any

import pytest
import torch

from incipit.backbones import GenerateOptions, tiny, writing
from incipit.backbones.memory import Shelf, Slots
from incipit.backbones.words import Words
from incipit.batch import Encoded
from incipit.injection import Injection, LayerShape

READS = [0, 1, 1, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("name", tiny.names("causal"))
@pytest.mark.parametrize("sample", [False, True])
def test_ends(world: Any, name: str, sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = f"{name}{'-single' if name == 'gemma2' else ''}/input"
    backbone, encoded = world.backbone(case), world.rows(case, count=len(READS))
    prompts = [world.prompt(case, length=length, seed=length) for length in (6, 2)]
    batch = world.batch(case, encoded, READS)
    injection = world.stack(prompts, batch)
    options = GenerateOptions(max_new_tokens=6, sample=sample, temperature=3.0, seed=2)

    monkeypatch.setattr(Words, "eos_ids", ())
    free = backbone.generate(batch, injection, options)
    assert {len(row) for row in free} == {6}
    ends = (free[0][3], free[1][0], free[2][1], free[4][2])
    monkeypatch.setattr(Words, "eos_ids", ends)
    cut = [row[: next((n for n, token in enumerate(row) if token in ends), 6)] for row in free]
    assert backbone.generate(batch, injection, options) == cut

    kept: list[int] = []
    plain = Slots.keep
    monkeypatch.setattr(Slots, "keep", lambda own, slots: kept.append(len(slots)) or plain(own, slots))  # type: ignore[func-returns-value]
    few = batch.select(torch.tensor([0, 1]))
    assert backbone.generate(few, injection.with_rows(few.rows), options) == cut[:2]
    assert kept == ([1] if backbone.streams and len(cut[0]) != len(cut[1]) else [])

    streams = backbone.streams
    backbone.streams = False
    try:
        for i, row in enumerate(cut):
            one = world.batch(case, [encoded[i]])
            assert backbone.generate(one, prompts[READS[i]].injection(), options) == [row]
    finally:
        backbone.streams = streams


@pytest.mark.parametrize("name", tiny.names("causal"))
@pytest.mark.parametrize("lengths", [(6,), (6, 6), (6, 2)])
def test_rows_of_one_length(world: Any, name: str, lengths: tuple[int, ...]) -> None:
    """Then no number is hidden from any row, where all prompts are of one length too."""
    case = f"{name}{'-single' if name == 'gemma2' else ''}/input"
    backbone, pieces = world.backbone(case), world.backbone(case).frequent_ids(40)
    encoded = [Encoded(tuple(pieces[i : i + 3])) for i in (0, 9, 21, 30)]
    reads = [i % len(lengths) for i in range(4)]
    prompts = [world.prompt(case, length=length, seed=seed) for seed, length in enumerate(lengths)]
    batch, options = world.batch(case, encoded, reads), GenerateOptions(max_new_tokens=3)
    together = backbone.generate(batch, world.stack(prompts, batch), options)
    streams = backbone.streams
    backbone.streams = False
    try:
        for one, k, ids in zip(encoded, reads, together, strict=True):
            assert backbone.generate(world.batch(case, [one]), prompts[k].injection(), options) == [ids]
    finally:
        backbone.streams = streams


def test_a_shelf_of_what_is_there() -> None:
    keys, values = torch.rand(2, 1, 3, 4), torch.ones(2, 1, 3, 5)
    live = torch.tensor([[True] * 3, [False, False, True]])
    both = Injection(
        torch.tensor([1, 0]), keys={"decoder": (keys,)}, values={"decoder": (values,)}, key_live=live
    )
    shelf = Shelf.of(both, (LayerShape(1, 4, 5),), torch.float32)
    assert torch.equal(shelf.keys[0], keys) and shelf.keys[0].mT.is_contiguous()
    assert shelf.values[0].data_ptr() == values.data_ptr()
    assert (shelf.length, shelf.lengths, shelf.place) == (3, {"0": 3, "1": 1}, {"0": 0, "1": 1})


def test_slots_are_given_back_when_half_of_them_are_idle() -> None:
    kept = Slots((LayerShape(1, 1, 1),), 5, 2, torch.float32, torch.device("cpu"))
    kept.keys[0][:, 0, 0, 0] = torch.arange(5.0)
    shelf = Shelf((LayerShape(1, 1, 1),), torch.float32, torch.device("cpu"))
    rows = writing.Rows(kept, shelf, [None] * 5, [1, 2, 3, 4, 5], {})
    rows.keep([1, 3, 4])
    assert rows.rows == [(1, 2, None), (3, 4, None), (4, 5, None)] and len(kept.keys[0]) == 5
    rows.keep([0, 2])
    assert rows.rows == [(0, 2, None), (1, 5, None)] and kept.keys[0].flatten(1)[:, 0].tolist() == [1.0, 4.0]


@pytest.mark.parametrize("vocabulary", [48, 50])
def test_the_largest_is_the_first_of_equals(vocabulary: int) -> None:
    source = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (40, vocabulary), generator=source).float()  # many equals
    scores[3, 7] = scores[3, 30] = torch.nan
    scores[4] = -torch.inf
    assert torch.equal(writing.largest(scores), scores.argmax(dim=-1))
    assert writing.largest(scores)[3:5].tolist() == [7, 0]
