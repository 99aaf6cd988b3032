"""What enters the first layer alike is projected once: the same loss and gradient from fewer rows of the products."""

from typing import Any

import pytest
import torch
from torch import Tensor

from incipit.backbones import alike, internals, reordered, tiny, wrap
from incipit.batch import Encoded, collate
from incipit.injection import Injection


def test_slots_are_told_by_their_names() -> None:
    """Names 7 7 9 7 in chunks of 3: two kinds and the filling (-1) of the second chunk."""
    same = alike.found(torch.tensor([7, 7, 9, 7]), 3)
    assert same is not None
    assert same.first.tolist() == [4, 0, 2] and same.kind.tolist() == [[1, 1, 2], [1, 0, 0]]
    assert alike.found(torch.tensor([7, 7, 9, 8]), 4) is not None  # 3 of 4 is still worth it
    assert alike.found(torch.tensor([7, 6, 9, 8]), 4) is None


# The norm of T5 is computed in float32 whatever the type of the model (transformers 5.23), hence the tolerance.
def told(backbone: Any) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of rows that read two prompts, one of them with a hole, and share words."""
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 4, 32, generator=source, dtype=torch.float64).requires_grad_()
    live = torch.tensor([[True, True, True, True], [True, False, True, True]])
    a, b, c, *_ = backbone.frequent_ids(5)
    texts = [(a, b), (a, b, c), (), (a, a, a, a, b), (c, b)]
    rows = [0, 1, 0, 1, 1]
    batch = collate([Encoded(t, (b, c)) for t in texts], rows, pad_id=backbone.pad_id)
    nll, _ = backbone.loss(batch, Injection(torch.tensor(rows), inputs=inputs, live=live))
    return nll.detach(), torch.autograd.grad(nll.sum(), inputs)[0]


@pytest.mark.parametrize("name", ["t5", "t5-gated", "mt5", "umt5"])
@pytest.mark.parametrize("wraps", [1, 2])
def test_loss_and_gradient_are_those_of_every_slot_for_itself(
    name: str, wraps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny.build(name, dtype="float64")
    backbone: Any = [wrap(name, model, tokenizer) for _ in range(wraps)][-1]
    assert backbone.streams and not backbone.notes
    sizes: list[int] = []
    query, *_ = internals.projections(backbone.modules["encoder"][0])
    query.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[:-1].numel()))
    ours = told(backbone)
    monkeypatch.setattr(alike, "found", lambda names, chunk: None)
    theirs = told(backbone)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
    # 4 + 3 prompt rows, 3 words, the filling, for 18 + 12 slots in one chunk; the hole is seen where rows are padded
    assert sizes[0] < 16 and sizes[1] % 32 == 0


def test_an_adapter_around_a_projection_is_left_in_peace() -> None:
    """LoRA at its start adds nothing, through whatever the projection is called by."""
    from incipit.run.adapters import adapt

    backbone: Any = wrap("t5", *tiny.build("t5", dtype="float64"))
    before = told(backbone)
    adapt(backbone.model, "lora", 2, 0)
    after = told(backbone)
    for mine, other in zip(before, after, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_what_is_alike_is_projected_by_weights_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewer rows, too, are multiplied with the reordered weight: forth and back."""
    monkeypatch.setattr(reordered, "SMALL", 1)
    backbone: Any = wrap("t5", *tiny.build("t5"))
    a, b, c, *_ = backbone.frequent_ids(5)
    batch = collate([Encoded((a, b, c, a, b, c), (b,))] * 4, pad_id=backbone.pad_id)
    inputs = torch.randn(1, 4, 32, requires_grad=True)
    backbone.loss(batch, Injection(batch.rows, inputs=inputs))[0].sum().backward()
    for layer in internals.projections(backbone.modules["encoder"][0]):
        (order,) = [h.kept for h in layer._forward_pre_hooks.values() if isinstance(h, reordered.Reordered)]
        assert order is not None and order[1]._back.layout == torch._mkldnn  # type: ignore[attr-defined]


def test_layers_of_another_make_are_left_alone() -> None:
    """BART's q_proj and a quantised q are no plain products of these names."""
    model, _ = tiny.build("bart")
    assert internals.projections(model.get_encoder().layers[0].self_attn) == []
    assert internals.projections(torch.nn.Identity()) == []
