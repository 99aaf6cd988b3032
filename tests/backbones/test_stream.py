"""Streams: rows end to end in one pass = every row for itself, for any lengths, prompts, windows and head groups."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from incipit.backbones import stream, tiny, twoparts, wrap
from incipit.backbones.reordered import padded
from incipit.batch import Batch, Encoded, collate
from incipit.injection import Injection
from incipit.prompts import InputPrompt
from incipit.run.parts import objective
from incipit.train.gradients import Parts, accumulate

DEPTH, HEADS = 3, 2  # size and number of key/value heads


def some(*shape: int, seed: int = 0) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_()


def one_row(
    q: Tensor, k: Tensor, v: Tensor, kp: Tensor, vp: Tensor, window: int | None, cap: float | None
) -> Tensor:
    """Attention of one row [N * G, W, D] after live prefix positions [N, P, D], written out."""
    groups = q.shape[0] // k.shape[0]
    keys = torch.cat([kp, k], dim=1).repeat_interleave(groups, dim=0)
    values = torch.cat([vp, v], dim=1).repeat_interleave(groups, dim=0)
    scores = 0.7 * q @ keys.mT
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    at = torch.arange(q.shape[1])[:, None] + kp.shape[1]
    back = at - torch.arange(keys.shape[1])
    hidden = (back < 0) | (back >= (window or 10**6))
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ values


ROWS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    rows=ROWS,
    lives=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    groups=st.integers(1, 3),
    window=st.sampled_from([None, 1, 3, 7]),
    cap=st.sampled_from([None, 2.0]),
    launch=st.sampled_from([0.0, 4.0, 1e9]),
    kept=st.sampled_from([0, 512]),
    told=st.booleans(),
    size=st.sampled_from([None, padded, lambda n: n + 3]),
)
def test_attention_is_that_of_each_row(
    rows: list[tuple[int, int]],
    lives: list[int],
    groups: int,
    window: int | None,
    cap: float | None,
    launch: float,
    kept: int,
    told: bool,
    size: Callable[[int], int] | None,
) -> None:
    lengths, prompts = [n for n, _ in rows], [k for _, k in rows]
    if not any(lengths):
        return
    longest, total = max(lengths), sum(lengths)
    flat = [some(len(rows) * longest, HEADS * g, DEPTH, seed=i) for i, g in enumerate((groups, 1, 1))]
    kp, vp = some(4, HEADS, 5, DEPTH, seed=3), some(4, HEADS, 5, DEPTH, seed=4)
    live = torch.tensor([[j >= 5 - n for j in range(5)] for n in lives])  # the dead stand in front
    alive = lives if told else []
    laid = stream.lay(
        lengths, prompts, longest, launch, torch.device("cpu"), alive=alive, group=launch, size=size
    )

    order = torch.tensor(laid.order)
    prefix = twoparts.Prefix(kp[order], vp[order], live[order])
    q, k, v = (t[laid.taken].transpose(0, 1)[None] for t in flat)
    before, twoparts.KEPT = twoparts.KEPT, kept
    try:
        out = twoparts.attention(q, k, v, prefix, laid, 0.7, window, cap)[0]  # [M, N * G, D]
        found = [out[laid.starts[i] : laid.starts[i] + n] for i, n in enumerate(lengths) if n]
        weight = some(total, HEADS * groups, DEPTH, seed=5).detach()
        ours = torch.autograd.grad((torch.cat(found) * weight).sum(), [*flat, kp, vp])
    finally:
        twoparts.KEPT = before

    plain = []
    for i, (n, prompt) in enumerate(rows):
        here = [t[i * longest : i * longest + n].transpose(0, 1) for t in flat]
        front = [t[prompt, :, 5 - lives[prompt] :] for t in (kp, vp)]
        plain.append(one_row(*here, *front, window, cap).transpose(0, 1))
    theirs = torch.autograd.grad((torch.cat(plain) * weight).sum(), [*flat, kp, vp])
    torch.testing.assert_close(torch.cat(found), torch.cat([p for p in plain if len(p)]))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=100, deadline=None)
@given(
    rows=ROWS, launch=st.sampled_from([0.0, 3.0, 1e9]), size=st.sampled_from([None, padded, lambda n: n + 3])
)
def test_every_slot_has_one_place(
    rows: list[tuple[int, int]], launch: float, size: Callable[[int], int] | None
) -> None:
    lengths, prompts = [n for n, _ in rows], [k for _, k in rows]
    longest, alive = max(lengths), [3, 0, 5, 5]
    laid = stream.lay(
        lengths, prompts, longest, launch, torch.device("cpu"), alive=alive, group=launch, size=size
    )
    for i, n in enumerate(lengths):
        assert (int(laid.starts[i]) == -1) == (n == 0)
        there = laid.taken[laid.starts[i] : laid.starts[i] + n] if n else []
        assert list(there) == [i * longest + j for j in range(n)]
        assert not n or set(laid.prompt[laid.starts[i] : laid.starts[i] + n].tolist()) == {prompts[i]}
    ends = [0, *(b.start + b.size for b in laid.blocks)]
    assert [b.start for b in laid.blocks] == ends[:-1] and ends[-1] == laid.end
    assert len(laid.taken) == (size(laid.end) if size and laid.end else laid.end)
    assert laid.end == sum(lengths) or launch > 0
    assert [laid.order[k] for k in laid.reads.tolist()] == laid.prompt.tolist()
    reached = [alive[k] for k in laid.order]
    assert reached == sorted(reached)
    assert [k for r in laid.readers for k in range(r.first, r.first + r.count)] == list(
        range(len(laid.order))
    )
    assert (laid.read is None) == (len(laid.order) < 2)
    found: list[int] = []
    for r in laid.readers:
        own = reached[r.span]
        assert r.length == max([1, *own]) and r.even == (set(own) == {r.length})
        if r.slots is not None and r.live is not None:
            k = torch.arange(r.first, r.first + r.count)[:, None].expand_as(r.slots)
            assert torch.equal(laid.reads[r.slots], k)  # padding too, which sends no gradient
            found += torch.where(r.live, r.slots, -1).flatten().tolist()
    if laid.read is not None:
        every = list(range(len(laid.taken)))
        assert sorted(c for c in found if c >= 0) == every
        assert [found[i] for i in laid.read.tolist()] == every


def test_prompts_of_like_length_are_read_together() -> None:
    """Six rows of one slot; prompts of 9, 1, 1 positions: 54 pairs in one part, 4 + 18 in two."""
    for group, parts in ((20, [2, 1]), (40, [3])):
        laid = stream.lay([1] * 6, [0, 1, 2] * 2, 1, 0.0, torch.device("cpu"), alive=[9, 1, 1], group=group)
        assert [r.count for r in laid.readers] == parts and laid.order == (1, 2, 0)


def test_rows_of_equal_length_are_one_block() -> None:
    laid = stream.lay([4] * 6, [0, 1, 2] * 2, 4, 0.0, torch.device("cpu"))
    assert laid.blocks == (stream.Block(0, 6, 4),) and laid.order == (0, 1, 2)


def test_a_block_more_must_pay() -> None:
    """Lengths 1, 1, 9: apart they have 11 slots in two blocks, together 27 in one."""
    counts = {
        launch: [b.width for b in stream.lay([1, 9, 1], [0] * 3, 9, launch, torch.device("cpu")).blocks]
        for launch in (0.0, 15.0, 17.0)
    }
    assert counts == {0.0: [1, 9], 15.0: [1, 9], 17.0: [9]}


@pytest.mark.parametrize("name", tiny.names("causal"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_causal_family_streams(name: str, dtype: str) -> None:
    backbone: Any = wrap(name, *tiny.build(name, dtype=dtype))
    whole = [
        "the last layer of 'gpt2' is computed at every slot, asked for or not"
    ]  # it counts the slots it gives
    assert backbone.streams and backbone.notes == (whole if name == "gpt2" else [])


@pytest.mark.parametrize("name", [n for n in tiny.names("causal") if n != "gpt2"])
def test_the_last_layer_where_something_is_asked(name: str) -> None:
    """The same states and gradient, and its feed-forward part sees asked slots alone."""
    backbone: Any = wrap(name, *tiny.build(name, dtype="float64"))
    source = torch.Generator().manual_seed(0)
    soft, embeds = (
        torch.randn(*shape, backbone.geometry.hidden, generator=source, dtype=torch.float64)
        for shape in ((3, 4), (5, 9))
    )
    live = torch.tensor([[True] * 4, [False, True, True, False], [True, False, False, False]])
    where = (
        torch.tensor([0, 4, 2, 0, 3, 4, 0]),
        torch.tensor([8, 2, 0, 3, 6, 7, 7]),
    )  # row, slot; none of row 1
    sizes: list[int] = []
    layer = backbone.last
    linear = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)][-1]
    linear.register_forward_hook(
        lambda module, given, out: sizes.append(given[0].numel() // linear.in_features)
    )

    def found() -> tuple[Tensor, Tensor]:
        sizes.clear()
        inputs = soft.clone().requires_grad_()
        keys = backbone.prefill(Injection(torch.tensor([2, 0, 1, 1, 0]), inputs=inputs, live=live))
        states = backbone._streamed(embeds, keys, *where)
        (states.sin().sum()).backward()
        assert inputs.grad is not None
        return states.detach(), inputs.grad

    narrow, few = found(), list(sizes)
    backbone.last = None
    whole = found()
    for a, b in zip(narrow, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if name != "mixtral":  # whose experts share the slots out
        assert few == [7]  # and no slot of a prompt
        assert sizes[0] >= 4 + 2 + 1 and sizes[1] >= 9 + 4 + 7 + 8  # so small a model pads rather than cuts


def losses(backbone: Any) -> Tensor:
    ids = backbone.frequent_ids(40)
    rows = [Encoded(tuple(ids[:n]), tuple(ids[n : n + u])) for n, u in ((3, 1), (9, 2), (0, 3), (5, 1))]
    batch = collate(rows, [0, 1, 1, 0], pad_id=backbone.pad_id)
    inputs = torch.randn(2, 3, backbone.geometry.hidden, generator=torch.Generator().manual_seed(0))
    part = Injection(batch.rows, inputs=inputs.to(backbone.dtype))
    nll: Tensor = backbone.loss(batch, part)[0]
    return nll


@pytest.mark.parametrize("name", tiny.names("causal"))
def test_a_stream_is_padded_rows(name: str) -> None:
    backbone: Any = wrap(name, *tiny.build(name))
    ours = losses(backbone)
    backbone.streams = False
    torch.testing.assert_close(ours, losses(backbone), rtol=1e-5, atol=1e-5)


def test_a_model_that_hands_nothing_on_is_padded_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.build("llama")
    plain = losses(wrap("plain", model, tokenizer))
    body = model.base_model
    forward = body.forward

    def deaf(*args: Any, incipit_stream: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model, tokenizer = tiny.build("llama")
    body, forward = model.base_model, model.base_model.forward
    monkeypatch.setattr(body, "forward", deaf)
    backbone: Any = wrap("deaf", model, tokenizer)
    assert not backbone.streams
    assert len(backbone.notes) == 1 and "rows of 'deaf' are padded" in backbone.notes[0]
    torch.testing.assert_close(losses(backbone), plain, rtol=1e-5, atol=1e-5)


def test_cuts_cost_least() -> None:
    """Against all ways to cut five rising widths."""
    tops = [1, 2, 4, 7, 8]
    for launch in (0.0, 1.0, 3.0, 6.0, 100.0):

        def cost(cuts: list[int], launch: float = launch) -> float:
            return sum((b - a) * tops[b - 1] + launch for a, b in pairwise([0, *cuts, 5]))

        best = min(cost([i + 1 for i in range(4) if bits >> i & 1]) for bits in range(16))
        ways = stream._cuts(range(1, 6), lambda low, high: (high - low) * tops[high - 1], launch)
        found = [high for _, high in ways][:-1]
        assert cost(found) == best


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_model_tuning_in_autocast(name: str) -> None:
    """Queries and keys that rotate are float32 there, values bfloat16: the backward pass must not mix them."""
    backbone: Any = wrap(name, *tiny.build(name))
    for parameter in backbone.model.parameters():
        parameter.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses(backbone).sum()
    loss.backward()
    found = [p.grad for p in backbone.model.parameters() if p.grad is not None]
    assert found and all(bool(g.isfinite().all()) for g in found)
    torch.testing.assert_close(loss, losses(backbone).sum(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", tiny.names("causal"))
def test_rows_without_a_label(name: str) -> None:
    """A conversation in which nobody answers, or raw text of one token: no loss, and no share in the gradient."""
    backbone: Any = wrap(name, *tiny.build(name))
    prompt = InputPrompt(backbone.geometry, 3, torch.randn(3, backbone.geometry.hidden))
    silent = [Encoded((5, 6)), Encoded((5, 6), (7, 8), (False, False))]
    batch = collate(silent, pad_id=backbone.pad_id)
    nll, count = backbone.loss(batch, prompt.injection().with_rows(batch.rows))
    assert nll.tolist() == [0, 0] and count.tolist() == [0, 0]
    rows = [(0, row) for row in [*silent, Encoded((9, 4, 3), (6, 2))]]

    def step(parts: Parts) -> tuple[Any, Tensor]:
        prompt.zero_grad()
        sums = accumulate(
            rows, 1, objective(backbone, [prompt]), collate, Accelerator(), torch.device("cpu"),
            parts=parts, precision="float32", asked=False,
        )  # fmt: skip
        return (sums.nll, sums.count, sums.tokens), prompt.soft.grad.clone()

    together, apart = step(Parts(rows=3)), step(Parts(rows=1))
    assert together[0][1:] == apart[0][1:] == ([2.0], 11)
    assert apart[0][0] == pytest.approx(together[0][0], rel=1e-5)
    torch.testing.assert_close(apart[1], together[1], rtol=1e-4, atol=1e-5)


def test_a_loss_that_reaches_no_prompt_is_an_error() -> None:
    """Otherwise nothing would be learned, and nothing would say so."""
    rows = [(0, Encoded((5,), (6,)))]

    def frozen(batch: Batch) -> tuple[Tensor, Tensor]:
        return torch.ones(1), torch.ones(1, dtype=torch.int64)

    with pytest.raises(RuntimeError, match="does not require grad"):
        accumulate(
            rows, 1, frozen, collate, Accelerator(), torch.device("cpu"),
            parts=Parts(), precision="float32", asked=False,
        )  # fmt: skip
