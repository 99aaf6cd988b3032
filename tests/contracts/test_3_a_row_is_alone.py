"""A row's numbers and words depend on neither neighbours, padding side, nor the prompts of other rows."""

from typing import Any

import torch

from incipit.backbones import GenerateOptions
from incipit.injection import Injection

WAYS = {
    "greedy": GenerateOptions(max_new_tokens=3),
    "beams": GenerateOptions(max_new_tokens=3, beams=3),
    "sampled": GenerateOptions(max_new_tokens=3, sample=True, temperature=2.0, top_k=40, top_p=0.95, seed=5),
}


def test_loss_of_a_row(world: Any, case: str) -> None:
    prompts = [world.prompt(case, length=length, seed=length) for length in (6, 2)]
    encoded, rows = world.rows(case), [0, 1, 1, 0, 1]
    together = world.nll(case, prompts, encoded, rows)
    left = world.nll(case, prompts, encoded, rows, side="left")
    alone = torch.cat([world.nll(case, [prompts[k]], [e], [0]) for e, k in zip(encoded, rows, strict=True)])
    torch.testing.assert_close(together, alone, **world.tolerance(case))
    torch.testing.assert_close(left, alone, **world.tolerance(case))


def test_next_token_of_a_row(world: Any, writer: str) -> None:
    backbone = world.backbone(writer)
    prompts = [world.prompt(writer, length=length, seed=length) for length in (6, 2)]
    encoded, rows = world.rows(writer), [0, 1, 1, 0, 1]

    def logs(some: list[Any], which: list[int], side: str = "right") -> torch.Tensor:
        batch = world.batch(writer, some, which, side)
        return backbone.next_token(batch, world.stack(prompts, batch))

    alone = torch.cat([logs([e], [k]) for e, k in zip(encoded, rows, strict=True)])
    assert alone.dtype == backbone.dtype
    torch.testing.assert_close(logs(encoded, rows), alone, **world.tolerance(writer))
    torch.testing.assert_close(logs(encoded, rows, "left"), alone, **world.tolerance(writer))


def test_what_a_row_writes(world: Any, plain: Any, writer: str) -> None:
    """Mixed batch, row alone, and greedy search written out."""
    backbone = world.backbone(writer)
    prompts = [world.prompt(writer, length=length, seed=length) for length in (6, 2)]
    encoded, rows = world.rows(writer, count=4), [0, 1, 1, 0]
    for way, options in WAYS.items():
        batch = world.batch(writer, encoded, rows, side="left" if way == "beams" else "right")
        together = backbone.generate(batch, world.stack(prompts, batch), options)
        for i in (0, 2) if way == "greedy" else (2,):
            one = world.batch(writer, [encoded[i]])
            part: Injection = prompts[rows[i]].injection()
            assert backbone.generate(one, part, options) == [together[i]], way
            if way == "greedy":
                name = writer.split("/")[0]
                assert together[i] == plain.written(name, part, encoded[i], 3, backbone.eos_ids)
