"""What a candidate answer scores depends on neither other candidates nor other rows, though all are read at once."""

from typing import Any

import pytest
import torch

from incipit.backbones import tiny
from incipit.batch import Encoded

SIZES = ((1, 3, 2), (2,), (1, 1), (4, 1, 2), (3, 3))  # tokens of each candidate of a row


def candidates(pieces: list[int]) -> list[list[tuple[int, ...]]]:
    source = torch.Generator().manual_seed(3)
    drawn = [[torch.randint(len(pieces), (n,), generator=source) for n in row] for row in SIZES]
    return [[tuple(pieces[int(i)] for i in ids) for ids in row] for row in drawn]


def test_candidates_of_a_row(world: Any, writer: str) -> None:
    """At once, in a mixed batch = each as the target of a row of its own, alone."""
    backbone = world.backbone(writer)
    prompts = [world.prompt(writer, length=length, seed=length) for length in (6, 2)]
    encoded, rows = world.rows(writer), [0, 1, 1, 0, 1]
    ends = candidates(backbone.frequent_ids(80))
    batch = world.batch(writer, encoded, rows, side="left")
    together = backbone.choices(batch, world.stack(prompts, batch), ends)
    for i, row in enumerate(ends):
        for ids, score in zip(row, together[i], strict=True):
            one = world.batch(writer, [Encoded(encoded[i].input_ids, ids)])
            alone = backbone.score(one, prompts[rows[i]].injection())
            expected = torch.tensor([score], dtype=alone.dtype)
            torch.testing.assert_close(alone, expected, **world.tolerance(writer))


@pytest.mark.parametrize("name", tiny.names("causal"))
@pytest.mark.parametrize("bare", [False, True])
def test_without_padding_and_with(world: Any, name: str, bare: bool) -> None:
    """The one pass over a forked row = a row for each candidate; also where a row has no text of its own."""
    case = f"{name}/input"
    backbone, prompt = world.backbone(case), world.prompt(case)
    encoded = world.rows(case, bare=bare)
    ends = candidates(backbone.frequent_ids(80))
    batch = world.batch(case, encoded)
    at_once = backbone.choices(batch, world.stack([prompt], batch), ends)
    backbone.streams = False
    try:
        padded = backbone.choices(batch, world.stack([prompt], batch), ends)
    finally:
        backbone.streams = True
    for a, b in zip(at_once, padded, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=3e-5, atol=3e-5)
    assert backbone.choices(batch, world.stack([prompt], batch), [[]] * len(batch)) == [[]] * len(batch)
