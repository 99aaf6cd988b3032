"""The loss of labels, some states at a time = cross-entropy of whole logits, gradient too."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from incipit.backbones import likelihood, tiny, wrap
from incipit.backbones.internals import Head
from incipit.backbones.likelihood import label_nll
from incipit.backbones.reordered import Reordered
from incipit.batch import Encoded, collate
from incipit.injection import Injection

STATES, HIDDEN, WORDS = 5, 3, 11


def head(
    dtype: torch.dtype = torch.float64, bias: bool = True, scale: float | None = None, shift: bool = False
) -> Head:
    layer = nn.Linear(HIDDEN, WORDS, bias=bias, dtype=dtype)
    source = torch.Generator().manual_seed(1)
    for p in layer.parameters():
        p.requires_grad_(False).copy_(torch.randn(p.shape, generator=source))
    return Head(layer, None, torch.ones(1, WORDS, dtype=dtype) if shift else None, scale, None, None)


def given(dtype: torch.dtype = torch.float64, states: int = STATES) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    made = torch.randn(states, HIDDEN, generator=source).to(dtype).requires_grad_()
    return made, torch.randint(0, WORDS, (states,), generator=source)


def plain(states: Tensor, labels: Tensor, whole: Head) -> Tensor:
    return F.cross_entropy(whole(states), labels, reduction="none")


@pytest.fixture(params=[1, 2, 100])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """States of a piece: five pieces, three of which the last is short, one."""
    monkeypatch.setattr(likelihood, "HELD", 0)
    monkeypatch.setattr(likelihood, "LEAST", request.param)
    return int(request.param)


@pytest.mark.parametrize("form", [{}, {"bias": False}, {"scale": 0.5}, {"shift": True}])
def test_it_is_cross_entropy(piece: int, form: dict[str, Any]) -> None:
    """Also of labels that weigh differently."""
    states, labels = given()
    weight = torch.arange(1.0, STATES + 1, dtype=torch.float64)
    found, right = label_nll(states, labels, head(**form)), plain(states, labels, head(**form))
    torch.testing.assert_close(found, right)
    ours, theirs = (torch.autograd.grad((t * weight).sum(), states)[0] for t in (found, right))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_where_they_always_were(piece: int, dtype: torch.dtype) -> None:
    states, labels = given(dtype)
    found = label_nll(states, labels, head(dtype))
    right = F.cross_entropy(head(dtype)(states).float(), labels, reduction="none")
    assert found.dtype == torch.float32 and torch.equal(found, right)
    ours, theirs = (torch.autograd.grad(t.sum(), states)[0] for t in (found, right))
    assert ours.dtype == dtype and torch.equal(ours, theirs)


def test_gradient_by_differences(piece: int) -> None:
    states, labels = given()
    assert torch.autograd.gradcheck(lambda s: label_nll(s, labels, head()), (states,))


def test_float32_is_near_float64(piece: int) -> None:
    (single, labels), (double, _) = given(torch.float32), given()
    found = label_nll(single, labels, head(torch.float32))
    right = plain(double, labels, head())
    torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(t.sum(), s)[0] for t, s in ((found, single), (right, double)))
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def test_no_label_and_no_gradient() -> None:
    states, labels = given(states=0)
    found = label_nll(states, labels, head())
    found.sum().backward()
    assert found.shape == (0,) and states.grad is not None and states.grad.shape == (0, HIDDEN)
    states, labels = given()
    with torch.no_grad():
        quiet = label_nll(states, labels, head())
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, plain(states, labels, head()).detach())


def test_a_broken_state_is_alone(piece: int) -> None:
    states, labels = given()
    broken = states.detach().clone()
    broken[1] = torch.nan
    found = label_nll(broken.requires_grad_(), labels, head())
    assert found.isnan().tolist() == [False, True, False, False, False]
    slope = torch.autograd.grad(found[torch.tensor([0, 2, 3, 4])].sum(), broken)[0]
    assert bool(slope[[0, 2, 3, 4]].isfinite().all())


def test_a_second_derivative_is_refused() -> None:
    states, labels = given()
    (slope,) = torch.autograd.grad(label_nll(states, labels, head()).sum(), states, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(slope.sum(), states)


def test_no_logits_are_kept(piece: int) -> None:
    states, labels = given()
    node: Any = label_nll(states, labels, head()).grad_fn
    assert [t.shape for t in node.saved_tensors] == [(STATES, HIDDEN)]


def test_what_may_learn_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that learns gets its gradient; hooks and adapters are part of the graph."""
    monkeypatch.setattr(likelihood._LabelLoss, "apply", None)
    states, labels = given()
    learns = head()
    learns.layer.weight.requires_grad_()
    label_nll(states, labels, learns).sum().backward()
    assert learns.layer.weight.grad is not None and states.grad is not None
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    hooked = head()
    hooked.layer.register_forward_hook(lambda module, args, out: factor * out)
    label_nll(states, labels, hooked).sum().backward()
    assert factor.grad is not None

    class Adapted(nn.Linear):
        pass

    adapted = head()
    adapted.layer.__class__ = Adapted
    torch.testing.assert_close(label_nll(states, labels, adapted), plain(states, labels, adapted))


def test_weights_in_order_are_read_in_order(piece: int) -> None:
    """A hook that only puts the product in order keeps the pieces."""
    states, labels = given(torch.float32)
    ordered = head(torch.float32)
    ordered.layer.register_forward_pre_hook(Reordered())
    found = label_nll(states, labels, ordered)
    torch.testing.assert_close(found, plain(states, labels, head(torch.float32)))
    ours = torch.autograd.grad(found.sum(), states)[0]
    torch.testing.assert_close(
        ours, torch.autograd.grad(plain(states, labels, head(torch.float32)).sum(), states)[0]
    )
    assert type(found.grad_fn).__name__ == "_LabelLossBackward"


@pytest.mark.parametrize("name", [*tiny.names("causal"), *tiny.names("encoder-decoder")])
def test_the_loss_of_a_backbone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with and without it, labels that are ignored and a row without labels included."""
    monkeypatch.setattr(likelihood, "HELD", 0)
    monkeypatch.setattr(likelihood, "LEAST", 2)
    backbone: Any = wrap(name, *tiny.build(name, dtype="float64"))
    ids = backbone.frequent_ids(40)
    sizes = (3, 4), (9, 2), (4, 0), (5, 1)
    rows = [Encoded(tuple(ids[:n]), tuple(ids[n : n + u])) for n, u in sizes]
    batch = collate(rows, [0, 1, 1, 0], pad_id=backbone.pad_id)
    batch.labels[0, 1] = -100
    soft = torch.randn(2, 3, backbone.geometry.hidden, generator=torch.Generator().manual_seed(0)).double()

    def found() -> tuple[Tensor, Tensor, Tensor]:
        inputs = soft.clone().requires_grad_()
        nll, count = backbone.loss(batch, Injection(batch.rows, inputs=inputs))
        nll.sum().backward()
        assert inputs.grad is not None
        return nll.detach(), count, inputs.grad

    ours = found()
    monkeypatch.setattr(likelihood, "_frozen", lambda layer: False)
    for a, b in zip(ours, found(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert ours[1].tolist() == [3, 2, 0, 1]
