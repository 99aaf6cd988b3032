"""Gradient checkpointing: the same loss and gradient, fewer bytes kept for the backward pass."""

from typing import Any

import pytest
import torch

from incipit.backbones import tiny, wrap
from incipit.batch import Encoded, collate
from incipit.errors import BackboneError
from incipit.injection import Injection

SHORT = ((3, 1), (9, 2), (0, 3), (5, 1))  # tokens of input and target


def step(backbone: Any, sizes: tuple[tuple[int, int], ...] = SHORT) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Loss and prompt gradient of a mixed batch, and bytes that were kept for it."""
    ids = backbone.frequent_ids(60)
    rows = [Encoded(tuple(ids[:n]), tuple(ids[n : n + u])) for n, u in sizes]
    batch = collate(rows, [0, 1, 1, 0], pad_id=backbone.pad_id)
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(
        2, 3, backbone.geometry.hidden, generator=source, dtype=backbone.dtype
    ).requires_grad_()
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = backbone.loss(batch, Injection(batch.rows, inputs=inputs))[0].sum()
    weights = {p.untyped_storage().data_ptr() for p in backbone.model.parameters()}
    total = sum(storage.nbytes() for place, storage in kept.items() if place not in weights)
    return loss.detach(), torch.autograd.grad(loss, inputs)[0], total


@pytest.mark.parametrize("name", tiny.names("causal"))
def test_the_same_with_less(name: str) -> None:
    backbone: Any = wrap(name, *tiny.build(name, dtype="float64"))
    loss, gradient, kept = step(backbone)
    try:
        backbone.recompute()
    except BackboneError as error:
        assert name in ("opt",), error  # drops out in the layer itself
        assert "set train.checkpointing = false" in str(error)
        again = step(backbone)  # and is as it was
        torch.testing.assert_close(again[0], loss)
        return
    assert not any(type(m).__name__ == "Dropout" and m.training for m in backbone.model.modules())
    less = step(backbone)
    torch.testing.assert_close(less[0], loss)
    inside = {"rtol": 1e-5, "atol": 1e-6} if name == "gemma3" else {}  # which works in float32 within
    torch.testing.assert_close(less[1], gradient, **inside)
    assert less[2] < kept / 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_memory_of_a_slot(name: str) -> None:
    """What is measured at load predicts what rows of another length keep, to a fifth (attention grows with length)."""
    backbone: Any = wrap(name, *tiny.build(name))
    each = backbone.slot_bytes()
    assert each == backbone.slot_bytes(), "the same every time, or a resumed run would cut its rows elsewhere"
    sizes = ((40, 1),) * 4  # of one length, for so small a model pads rather than cuts
    assert step(backbone, sizes)[2] == pytest.approx((sum(n for n, _ in sizes) + 2 * 3) * each, rel=0.2)


@pytest.mark.parametrize("name", tiny.names("encoder-decoder", "encoder"))
def test_every_family_knows_its_slots(name: str) -> None:
    backbone = wrap(name, *tiny.build(name))
    assert backbone.geometry.hidden * 4 * 2 < backbone.slot_bytes() < backbone.geometry.hidden * 4 * 1000


@pytest.mark.parametrize("name", ["t5", "bert-tiny"])
def test_others_refuse(name: str) -> None:
    found = [n for n in tiny.names("encoder-decoder", "encoder") if n.startswith(name.split("-")[0])]
    with pytest.raises(BackboneError, match="cannot compute its layers again"):
        wrap(name, *tiny.build(found[0])).recompute()
