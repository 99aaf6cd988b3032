"""Prefilled and batched = the plain concatenation of one row: same loss, same gradient, in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from incipit.backbones import tiny
from incipit.injection import Injection
from incipit.prompts import Framed, Prompt, Reading


def gradients(prompts: list[Prompt]) -> list[Tensor]:
    found = [p.grad.clone() for prompt in prompts for p in prompt.parameters()]
    for prompt in prompts:
        prompt.zero_grad()
    return found


def check(world: Any, plain: Any, case: str, bare: bool, rows: list[int]) -> None:
    prompts = [world.prompt(case, length=length, seed=length, wide=True) for length in (6, 3)]
    encoded = world.rows(case, count=len(rows), bare=bare)
    name = case.split("/")[0]

    ours = world.nll(case, prompts, encoded, rows)
    ours.sum().backward()
    ours_gradients = gradients(prompts)
    theirs = torch.stack(
        [plain.nll(name, prompts[k].injection(), e) for k, e in zip(rows, encoded, strict=True)]
    )
    theirs.sum().backward()

    torch.testing.assert_close(ours, theirs, **world.tolerance(case))
    for a, b in zip(ours_gradients, gradients(prompts), strict=True):
        torch.testing.assert_close(a, b, **world.tolerance(case))


def test_loss_and_gradient(world: Any, plain: Any, case: str) -> None:
    check(world, plain, case, bare=False, rows=[0, 1, 0, 0, 1])


BARE = [
    f"{name}/{kind}"
    for name in tiny.names("causal")
    for kind in ("input", "framed(input)", "mlp(input)", "framed(prefix@decoder)")
]


@pytest.mark.parametrize("bare", BARE)
def test_first_label_right_after_the_prompt(world: Any, plain: Any, bare: str) -> None:
    check(world, plain, bare, bare=True, rows=[0, 1, 0, 0, 1])


@pytest.mark.parametrize("name", tiny.names("causal"))
def test_one_row_of_input_and_no_text(world: Any, plain: Any, name: str) -> None:
    """A prompt of length 1 has nothing to share beside its last row."""
    prompt = world.prompt(f"{name}/input", length=1, wide=True)
    encoded = world.rows(f"{name}/input", count=4, bare=True)
    ours = world.nll(f"{name}/input", [prompt], encoded, [0] * 4)
    theirs = torch.stack([plain.nll(name, prompt.injection(), e) for e in encoded])
    torch.testing.assert_close(ours, theirs, **world.tolerance(name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("shape", ["dead", "one", "dead behind keys"])
def test_prompts_of_no_row_and_of_one(world: Any, plain: Any, name: str, shape: str) -> None:
    """Slots that are all dead are no prompt; of a single live one nothing is left beside the last."""
    backbone = world.backbone(name)
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 5, 32, generator=source, dtype=torch.float64)
    live = torch.arange(5)[None] == (2 if shape == "one" else 9)
    more: dict[str, Any] = {}
    if shape == "dead behind keys" and backbone.family == "causal":
        before = world.prompt(f"{name}/prefix@decoder", wide=True).injection()
        more = {"keys": before.keys, "values": before.values}
    encoded = world.rows(name, count=3, bare=backbone.family == "causal" and shape == "one")
    batch = world.batch(name, encoded)
    ours = backbone.loss(batch, Injection(batch.rows, inputs=inputs, live=live, **more))[0]
    there = Injection(torch.zeros(1, dtype=torch.int64), inputs=inputs[live][None], **more)
    theirs = torch.stack([plain.nll(name, there, e) for e in encoded])
    torch.testing.assert_close(ours, theirs, **world.tolerance(name))


@pytest.mark.parametrize("name", tiny.names("encoder"))
@pytest.mark.parametrize("readout", ["words", "verbalizer", "head"])
def test_class_scores(world: Any, plain: Any, name: str, readout: str) -> None:
    case = f"{name}/{readout}:input"
    prompt, encoded = world.prompt(case), world.rows(case)
    batch = world.batch(case, encoded)
    ours = world.backbone(case).class_logits(batch, world.stack([prompt], batch))
    theirs = torch.stack([plain.scores(name, prompt.injection(), e) for e in encoded])
    torch.testing.assert_close(ours, theirs, **world.tolerance(name))


@pytest.mark.parametrize("name", tiny.names("causal", "encoder-decoder"))
def test_without_a_prompt(world: Any, plain: Any, name: str) -> None:
    """The bare backbone is the stock model."""
    encoded = world.rows(name)
    ours = world.backbone(name).loss(world.batch(name, encoded), None)[0]
    nothing = Injection(torch.zeros(1, dtype=torch.int64), inputs=torch.zeros(1, 0, 32, dtype=torch.float64))
    theirs = torch.stack([plain.nll(name, nothing, e) for e in encoded])
    torch.testing.assert_close(ours, theirs, **world.tolerance(name))


def test_constant_text_is_text(world: Any, plain: Any, every: str) -> None:
    """Framed words before the text = the same words at the beginning of the text."""
    backbone = world.backbone(every)
    encoder = backbone.family == "encoder"
    ids = backbone.frequent_ids(30)
    prompt: Prompt = Framed(backbone.geometry, None, [ids[3], ids[20]], [ids[7]], backbone.embed)
    if encoder:
        prompt = Reading(prompt, backbone.readout(["good", "bad", "neutral"], "verbalizer"))
    encoded = world.rows(every)
    longer = [replace(e, input_ids=(ids[3], ids[20], ids[7], *e.input_ids)) for e in encoded]
    ours = world.nll(every, [prompt], encoded, [0] * len(encoded))
    readout = prompt.injection().readout
    nothing = Injection(torch.zeros(1, dtype=torch.int64), inputs=torch.zeros(1, 0, 32), readout=readout)
    theirs = torch.stack([plain.nll(every, nothing, e) for e in longer])
    torch.testing.assert_close(ours, theirs, **world.tolerance(every))
