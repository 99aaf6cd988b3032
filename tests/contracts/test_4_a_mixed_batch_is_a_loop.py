"""K prompts of different lengths in one batch = K batches of one prompt."""

from typing import Any

import torch

from incipit.backbones import tiny
from incipit.injection import Injection


def test_mixed_batch(world: Any, case: str) -> None:
    prompts = [world.prompt(case, length=length, seed=length) for length in (6, 1, 3)]
    encoded, rows = world.rows(case, count=8), [2, 0, 1, 0, 2, 1, 1, 0]
    mixed = world.nll(case, prompts, encoded, rows)
    for k, prompt in enumerate(prompts):
        own = [i for i, row in enumerate(rows) if row == k]
        looped = world.nll(case, [prompt], [encoded[i] for i in own], [0] * len(own))
        torch.testing.assert_close(mixed[own], looped, **world.tolerance(case))


def test_dead_positions_are_not_there(world: Any, every: str) -> None:
    """A prompt with pruned rows = the shorter prompt of the rows that are left; one without any row = no prompt."""
    case = f"{every}/{'words:' if tiny.TINY[every].family == 'encoder' else ''}input"
    backbone, encoded = world.backbone(case), world.rows(case)
    batch = world.batch(case, encoded, [0, 0, 1, 1, 0])
    part = world.prompt(case, length=6).injection()
    live = torch.tensor([[False, True, True, False, True, False], [False] * 6])
    readout = part.readout and Injection.stack([part, part], batch.rows).readout
    inputs = torch.cat([part.inputs, part.inputs]).detach().requires_grad_()
    holed = Injection(batch.rows, inputs=inputs, live=live, readout=readout)
    ours = backbone.loss(batch, holed)[0]
    ours.sum().backward()
    assert bool(torch.isfinite(inputs.grad).all())
    assert ((inputs.grad != 0).any(dim=2) & ~live).sum() == 0

    short = Injection(torch.zeros(5, dtype=torch.int64), inputs=part.inputs[:, live[0]], readout=part.readout)
    empty = Injection(torch.zeros(5, dtype=torch.int64), inputs=part.inputs[:, :0], readout=part.readout)
    for injection, own in ((short, [0, 1, 4]), (empty, [2, 3])):
        alone = backbone.loss(world.batch(case, [encoded[i] for i in own]), injection)[0]
        torch.testing.assert_close(ours[own], alone, **world.tolerance(case))


def test_dead_keys_are_not_there(world: Any, every: str) -> None:
    if every == "deberta-v2":
        return  # takes no keys and values; test_refusals.py
    family = tiny.TINY[every].family
    case = f"{every}/{'words:' if family == 'encoder' else ''}prefix@{'encoder' if family == 'encoder' else 'decoder'}"
    backbone, encoded = world.backbone(case), world.rows(case)
    batch = world.batch(case, encoded)
    part = world.prompt(case, length=6).injection()
    live = torch.tensor([True, False, True, True, False, True])

    def cut(sites: Any) -> Any:
        return {s: tuple(t[:, :, live] for t in ts) for s, ts in sites.items()}

    rows, readout = batch.rows, part.readout
    holed = Injection(rows, keys=part.keys, values=part.values, key_live=live[None], readout=readout)
    short = Injection(rows, keys=cut(part.keys), values=cut(part.values), readout=readout)
    torch.testing.assert_close(
        backbone.loss(batch, holed)[0], backbone.loss(batch, short)[0], **world.tolerance(case)
    )
