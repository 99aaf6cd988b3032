"""Attention beside prefixes that stand once = attention over [prefix; keys] copied for every row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from incipit.backbones import shared

DEPTH, HEADS, LENGTH, KEYS = 3, 2, 4, 5


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    repeats=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries=st.sampled_from([1, 2, 5]),
    masked=st.booleans(),
    cap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 99),
)
def test_two_parts_are_one_softmax(
    rows: list[int], repeats: int, groups: int, queries: int, masked: bool, cap: float | None, seed: int
) -> None:
    source = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    order, prompts, found = shared.grouped(rows, repeats)
    assert sorted(order) == list(range(len(rows))) and prompts == list(dict.fromkeys(rows[i] for i in order))
    reads = [rows[i] for i in order for _ in range(repeats)]
    batch = len(reads)
    q, k, v = some(batch, HEADS * groups, queries, DEPTH), *(some(batch, HEADS, KEYS, DEPTH) for _ in "kv")
    kp, vp = some(4, HEADS, LENGTH, DEPTH), some(4, HEADS, LENGTH, DEPTH)
    causal = torch.ones(queries, KEYS, dtype=torch.bool).tril(KEYS - queries)
    mask = None
    seen = torch.cat([torch.ones(queries, LENGTH, dtype=torch.bool), causal], dim=1).expand(batch, -1, -1)
    if masked:
        drawn = torch.rand(batch, queries, LENGTH + KEYS, generator=source) < 0.7
        drawn[:, :, -1] = True
        mask = drawn[:, None]
        seen = drawn

    beside = shared.Shared(kp[prompts], vp[prompts], found, seen=not masked)
    ours = shared.attention(q, k, v, beside, mask, 0.7, cap)

    keys = torch.cat([kp[reads], k], dim=2).repeat_interleave(groups, dim=1)
    values = torch.cat([vp[reads], v], dim=2).repeat_interleave(groups, dim=1)
    scores = 0.7 * q @ keys.mT
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    theirs = scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1) @ values
    torch.testing.assert_close(ours, theirs.transpose(1, 2))


def test_prompts_of_equally_many_rows_are_one_group() -> None:
    order, prompts, groups = shared.grouped([2, 0, 2, 1, 0, 3, 3, 3])
    assert (order, prompts) == ([3, 0, 2, 1, 4, 5, 6, 7], [1, 2, 0, 3])
    assert groups == (shared.Group(0, 0, 1, 1), shared.Group(1, 1, 2, 2), shared.Group(5, 3, 1, 3))


def test_a_row_that_sees_nothing_stays_finite() -> None:
    """Padding before a text is such a row; its numbers are never read, but must not be NaN in a cache."""
    one = torch.ones(1, HEADS, 1, DEPTH)
    beside = shared.Shared(one, one, (shared.Group(0, 0, 1, 1),), seen=False)
    blind = torch.zeros(1, 1, 1, 2, dtype=torch.bool)
    assert shared.attention(one, one, one, beside, blind, 1.0, None).isfinite().all()
