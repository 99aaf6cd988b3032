"""After one step every live row that the text can see has changed; no pruned number and no byte of the backbone has."""

from typing import Any

import torch
from torch import Tensor

from incipit.backbones import tiny
from incipit.prompts import Masked, Prompt


def table(prompt: Any) -> Tensor:
    """The effective rows [P, W], whatever wraps them."""
    while not hasattr(prompt, "rows"):
        prompt = prompt.inner
    if hasattr(prompt, "net") and isinstance(prompt.inner, Masked):  # a network gives every row a value
        prompt = prompt.bake()
    return prompt.rows().detach().clone()


def live(prompt: Prompt) -> Tensor:
    """Which numbers of the rows are not pruned, [P, W] bool."""
    masks = [m for m in prompt.modules() if isinstance(m, Masked)]
    return masks[0].spread()[masks[0].placed] if masks else torch.ones_like(table(prompt), dtype=torch.bool)


def seen(case: str, prompt: Prompt) -> list[bool]:
    """Which rows reach a label: all, but for a model of windows alone."""
    name, kind = case.split("/")
    length = len(table(prompt))
    if name != "mistral" or "mlp" in kind or "lstm" in kind:  # a network moves all rows at once
        return [True] * length
    reach = tiny.WINDOW - 1  # slots that one layer looks back
    if "behind" in kind:  # their label follows: the furthest of 6 rows is as far as two layers look
        return [row >= length - 2 * reach for row in range(length)]
    if "@" in kind:  # no prompt position computes anything, so the text must see it itself
        return [row >= length - reach for row in range(length)]
    first = prompt.length  # slot of the shortest row's only text token, which predicts its first label
    offset = 2 if "framed" in kind else 0
    return [offset + row >= first - 2 * reach for row in range(length)]


def test_rows_move_and_the_backbone_does_not(world: Any, case: str) -> None:
    backbone = world.backbone(case)
    prompt = world.prompt(case)
    frozen = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    before, constants = table(prompt), [b.clone() for b in prompt.buffers()]
    encoded = world.rows(case)
    world.nll(case, [prompt], encoded, [0] * len(encoded)).sum().backward()
    torch.optim.Adam([p for p in prompt.parameters() if p.requires_grad], lr=0.01).step()

    now, kept = table(prompt), live(prompt)
    moved = (now != before).any(dim=1).tolist()
    assert moved == [row and bool(k.any()) for row, k in zip(seen(case, prompt), kept, strict=True)]
    assert bool((now[~kept] == 0).all()) and bool((now[kept] != 0).all())
    assert all(torch.equal(a, b) for a, b in zip(prompt.buffers(), constants, strict=True))
    assert all(torch.equal(v, frozen[k]) for k, v in backbone.model.state_dict().items())
    assert not any(m.training for m in backbone.model.modules())
    assert all(not p.requires_grad and p.grad is None for p in backbone.model.parameters())


def test_every_parameter_of_a_prompt_learns(world: Any, case: str) -> None:
    """A parameter without gradient would be saved, counted and never trained."""
    prompt, encoded = world.prompt(case), world.rows(case)
    world.nll(case, [prompt], encoded, [0] * len(encoded)).sum().backward()
    idle = [n for n, p in prompt.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert idle == []
    assert set(prompt.units()) == {n for n, _ in prompt.named_parameters()}
