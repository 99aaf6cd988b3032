"""Products with reordered weights = products with the weights as they are, with their gradients."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from incipit.backbones import GenerateOptions, reordered, tiny, wrap
from incipit.batch import Encoded, collate
from incipit.injection import Injection

NEAR: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reordered, "SMALL", 1)
    monkeypatch.setattr(reordered, "ALONE", 1)


def hooked(layer: nn.Module) -> list[Any]:
    return [h for h in layer._forward_pre_hooks.values() if isinstance(h, reordered.Reordered)]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1,), (7,), (2, 3), (0,)])
def test_a_layer(bias: bool, rows: tuple[int, ...]) -> None:
    layer = nn.Linear(5, 3, bias=bias).requires_grad_(False)
    x, given = torch.randn(*rows, 5, requires_grad=True), torch.randn(*rows, 3)
    plain = layer(x)
    (slope,) = torch.autograd.grad(plain, x, given)
    assert reordered.attach(nn.Sequential(layer)) == 1
    found = layer(x)
    (found_slope,) = torch.autograd.grad(found, x, given)
    with torch.no_grad():
        unseen = layer(x.detach())
    for ours, theirs in ((found, plain), (found_slope, slope), (unseen, plain.detach())):
        assert type(ours) is torch.Tensor
        torch.testing.assert_close(ours, theirs, **NEAR)
    (hook,) = hooked(layer)
    assert (hook.kept is not None) == bool(x.numel())


@pytest.mark.usefixtures("small")
def test_a_weight_that_changes_is_put_in_order_anew() -> None:
    layer = nn.Linear(4, 4, bias=False).requires_grad_(False)
    reordered.attach(layer)
    x = torch.eye(4)
    torch.testing.assert_close(layer(x), layer.weight.T, **NEAR)
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), layer.weight.T, **NEAR)
    layer.weight = nn.Parameter(torch.ones(4, 4), requires_grad=False)
    torch.testing.assert_close(layer(x), torch.ones(4, 4), **NEAR)


@pytest.mark.usefixtures("small")
def test_what_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    learns, frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
    reordered.attach(nn.Sequential(learns, frozen))
    learns(torch.ones(2, 4)).sum().backward()
    assert learns.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(torch.ones(2, 4)).dtype == torch.bfloat16
    frozen.double()
    assert frozen(torch.ones(2, 4, dtype=torch.float64)).dtype == torch.float64
    assert [h.kept for layer in (learns, frozen) for h in hooked(layer)] == [None, None]
    assert reordered.attach(nn.Sequential(learns, frozen)) == 0  # hooked before; of another type
    monkeypatch.setattr(reordered, "fast", lambda dtype: True)
    assert reordered.attach(nn.Linear(4, 4, dtype=torch.bfloat16)) == 0


@pytest.mark.parametrize("kept", [True, False], ids=["in order", "widened"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_of_16_bits_that_the_processor_does_not_multiply(
    dtype: torch.dtype, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sum in float32, rounded once: the nearest number of 16 bits to the exact one, and its gradient."""
    monkeypatch.setattr(reordered, "fast", lambda dtype: False)
    monkeypatch.setattr(reordered, "total", lambda _: 2**40 if kept else 0)
    layer = nn.Linear(5, 3, dtype=dtype).requires_grad_(False)
    assert reordered.attach(nn.Sequential(layer)) == kept and len(hooked(layer)) == 1
    x, given = torch.randn(7, 5).to(dtype).requires_grad_(), torch.randn(7, 3).to(dtype)
    found = layer(x)
    (slope,) = torch.autograd.grad(found, x, given)
    with torch.no_grad():
        unseen = layer(x.detach())
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    for ours, wanted in ((found, exact), (unseen, exact), (slope, given.double() @ layer.weight.double())):
        assert type(ours) is torch.Tensor and ours.dtype == dtype
        torch.testing.assert_close(ours.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_small_weights_and_large_models_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(256, 256, bias=False)  # 2^16 numbers, 2^18 bytes
    assert reordered.attach(nn.Linear(255, 256)) == 0
    monkeypatch.setattr(reordered, "total", lambda _: 2**21 - 8)
    assert reordered.attach(layer) == 0
    monkeypatch.setattr(reordered, "total", lambda _: 2**21)
    assert reordered.attach(layer) == 1


@pytest.mark.usefixtures("small")
def test_a_copy_begins_anew() -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    reordered.attach(layer)
    x = torch.ones(2, 4)
    before = layer(x)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        (hook,) = hooked(again)
        assert hook.kept is None
        torch.testing.assert_close(again(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", tiny.names("causal", "encoder-decoder"))
def test_a_backbone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = wrap(name, *tiny.build(name))
    monkeypatch.setattr(reordered, "SMALL", 1)
    ordered = wrap(name, *tiny.build(name))
    linear = [m for m in ordered.model.modules() if type(m) is nn.Linear]
    assert all(len(hooked(m)) == 1 for m in linear) and not any(hooked(m) for m in plain.model.modules())
    assert plain.notes == ordered.notes
    ids = plain.frequent_ids(30)
    batch = collate(
        [Encoded(tuple(ids[:5]), tuple(ids[5:8])), Encoded(tuple(ids[9:11]), (ids[3],))], pad_id=plain.pad_id
    )
    soft = plain.embed(ids[20:23])[None]
    found = []
    for backbone in (plain, ordered):
        rows = soft.clone().requires_grad_()
        loss = backbone.loss(batch, Injection(batch.rows, inputs=rows))[0]
        slope = torch.autograd.grad(loss.sum(), rows)[0]
        injection = Injection(batch.rows, inputs=soft)
        text = backbone.generate(batch, injection, GenerateOptions(max_new_tokens=4))
        found.append((loss.detach(), slope, backbone.next_token(batch, injection), text))
    for ours, theirs in zip(found[1][:3], found[0][:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert found[1][3] == found[0][3]


def test_few_sizes_are_compiled_and_none_is_much_larger() -> None:
    sizes = [reordered.padded(rows) for rows in range(1, 4097)]
    assert all(rows <= size <= max(8, 1.25 * rows) for rows, size in enumerate(sizes, 1))
    assert sizes[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 12, 12] and len(set(sizes)) == 44


@pytest.mark.parametrize("rows", [1, 9, 33, 100])
def test_rows_behind_change_nothing(rows: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(300, 400).requires_grad_(False)
    plain = copy.deepcopy(layer)
    assert reordered.attach(layer) == 1
    x = torch.randn(rows, 300, requires_grad=True)
    for shape in ((rows, 300), (1, rows, 300)):
        out, expected = layer(x.view(shape)), plain(x.view(shape))
        assert out.shape == expected.shape and torch.allclose(out, expected, atol=1e-5)
        ours, theirs = (torch.autograd.grad(o.square().sum(), x)[0] for o in (out, expected))
        assert torch.allclose(ours, theirs, atol=1e-3, rtol=1e-5)


def test_one_row_goes_the_short_way_through_a_small_layer() -> None:
    layer = nn.Linear(300, 400).requires_grad_(False)
    assert reordered.attach(layer) == 1
    (hook,) = hooked(layer)
    layer(torch.randn(1, 1, 300))
    assert hook.kept is None
    layer(torch.randn(1, 2, 300))
    assert hook.kept is not None
