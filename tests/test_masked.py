"""A mask over rows: numbers to count by hand, misuse, PEFT, and what a removed token saves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from incipit import artifact, files
from incipit.backbones import Backbone, tiny, wrap
from incipit.batch import Encoded, collate
from incipit.errors import InteropError, PromptError
from incipit.injection import Geometry, LayerShape
from incipit.interop import peft
from incipit.interop.given import rows_of
from incipit.prompts import Framed, InputPrompt, Masked, PrefixPrompt, Prompt, Reading, Reparametrised, build
from incipit.prompts.masked import mask_of, rewrapped, rows_within

SHAPE = Geometry("causal", 4, 10, 1.0, 0, {"decoder": (LayerShape(1, 2, 2),)})
ROWS = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
MASK = torch.tensor([[True, False], [False, False], [True, True]])  # three tokens of two pieces


def masked(removed: bool = False) -> Masked:
    return Masked(InputPrompt(SHAPE, 3, ROWS), MASK, removed)


def test_zeroing_by_hand() -> None:
    prompt = masked()
    assert prompt.rows().tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [9, 10, 11, 12]]
    assert prompt.injection().inputs.tolist() == [prompt.rows().tolist()]
    assert prompt.inner.soft.tolist() == prompt.rows().tolist()  # what an artifact keeps
    assert (prompt.length, prompt.tokens, prompt.kept, prompt.pieces) == (3, 2, 6, 2)


def test_removal_by_hand() -> None:
    prompt = masked(removed=True)
    assert prompt.rows().tolist() == [[1, 2, 0, 0], [9, 10, 11, 12]]
    part = prompt.injection()
    assert part.length == prompt.length == 2 and part.live.tolist() == [[True, True]]
    assert prompt.kept == 6


@pytest.mark.parametrize("removed", [False, True])
def test_pruned_numbers_stay_zero_whatever_is_put_there(removed: bool) -> None:
    prompt = masked(removed)
    with torch.no_grad():
        prompt.inner.soft.fill_(7.0)
    assert prompt.injection().inputs.flatten().tolist().count(0.0) == (2 if removed else 6)
    prompt.injection().inputs.sum().backward()
    assert prompt.inner.soft.grad.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    prompt.set_rows(torch.ones(prompt.length, 4))
    assert prompt.inner.soft.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("optimiser", ["adafactor", "adamw"])
def test_steps_and_decay_leave_pruned_numbers_at_zero(optimiser: str) -> None:
    from incipit.train.optim import Optimiser, OptimSettings

    prompt = masked()
    steps = Optimiser(
        dict(prompt.named_parameters()), OptimSettings(name=optimiser, weight_decay=0.1), prompt.units(), 0.1
    )
    for step in range(1, 4):
        (prompt.injection().inputs ** 2).sum().backward()
        steps.step(step, 3)
        prompt.zero_grad()
    assert bool((prompt.inner.soft[~prompt.spread()] == 0).all())
    assert bool((prompt.inner.soft[prompt.spread()] != ROWS[prompt.spread()]).all())


def test_the_card_says_which_pieces_are_kept() -> None:
    spec = json.loads(json.dumps(masked(True).spec()))
    assert spec["mask"] == ["10", "00", "11"] and spec["removed"] is True
    again = build(spec, SHAPE, lambda ids: torch.zeros(len(ids), 4))
    assert isinstance(again, Masked) and torch.equal(again.mask, MASK) and again.length == 2


def test_tokens_of_a_prefix_can_be_pruned() -> None:
    prefix = PrefixPrompt(SHAPE, 3, rows=ROWS)
    zeroed, removed = (Masked(prefix if not r else PrefixPrompt(SHAPE, 3, rows=ROWS), MASK.any(1)[:, None], r)
                       for r in (False, True))  # fmt: skip
    assert zeroed.injection().keys["decoder"][0].tolist() == [[[[1, 2], [0, 0], [9, 10]]]]
    assert removed.injection().values["decoder"][0].tolist() == [[[[3, 4], [11, 12]]]]
    assert removed.injection().key_live.tolist() == [[True, True]]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Masked(InputPrompt(SHAPE, 3), torch.ones(2, 2)), r"shape \(2, 2\), a prompt of 3 rows needs \(3, k\)"),
        (lambda: Masked(InputPrompt(SHAPE, 3), torch.ones(3, 3)), "3 pieces do not divide a row of 4 numbers"),
        (lambda: Masked(InputPrompt(SHAPE, 3), torch.zeros(3, 2)), "keeps nothing: keep at least one piece"),
        (lambda: Masked(PrefixPrompt(SHAPE, 3), torch.ones(3, 2)), "has no pieces: prune its tokens alone"),
        (lambda: Masked(masked(), MASK), "'masked' prompt: .* prune the prompt that a masked one came from"),
        (lambda: Masked(Reparametrised(InputPrompt(SHAPE, 3)), MASK), "bake a reparametrised one first"),  # type: ignore[arg-type]
        (lambda: mask_of(["10", "1"]), "no table of 0 and 1"),
        (lambda: mask_of(["12"]), "no table of 0 and 1"),
        (lambda: rows_within(Framed(SHAPE, None, [1], [], lambda i: torch.zeros(len(i), 4))), "no trained rows"),
    ],
)  # fmt: skip
def test_misuse(make: Any, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        make()


def test_what_stands_around_the_rows_stays() -> None:
    backbone = wrap("bert", *tiny.build("bert"))
    rows = InputPrompt(backbone.geometry, 3, torch.randn(3, 32))
    inner = Framed(backbone.geometry, rows, backbone.frequent_ids(9)[7:], [], backbone.embed)
    prompt = Reading(inner, backbone.readout(["good", "bad"], "head"), trained=True)
    with torch.no_grad():
        prompt.bias.fill_(0.5)
    mask = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
    made = rewrapped(
        prompt, lambda table: Masked(InputPrompt(backbone.geometry, 3, table.rows()), mask, True)
    )
    part, before = made.injection(), prompt.injection()
    assert made.length == prompt.length - 1 and part.length == before.length - 1
    kept = [0, 1, 2, 4]  # two constant rows, then the first and the third
    assert torch.equal(part.inputs[0], before.inputs[0, kept])
    assert torch.equal(part.readout.bias, before.readout.bias) and made.bias is not prompt.bias


# -- what removal saves ---------------------------------------------------------------------------------


def flops(backbone: Backbone, prompt: Prompt, encoded: list[Encoded]) -> int:
    """Multiply-adds of the loss and its gradient, counted."""
    with FlopCounterMode(display=False) as counter:
        backbone.loss(collate(encoded, pad_id=backbone.pad_id), prompt.injection())[0].sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_removed_token_costs_what_no_token_costs(name: str) -> None:
    backbone = wrap(name, *tiny.build(name))
    words = tuple(backbone.frequent_ids(80)[:5])
    encoded = [Encoded(words, () if name == "bert" else words[:1], choice=0)] * 3
    mask = torch.tensor([[True], [False], [True], [False], [False], [True]])

    def prompt(kind: str) -> Prompt:
        rows = InputPrompt(
            backbone.geometry, 3 if kind == "short" else 6, torch.randn(3 if kind == "short" else 6, 32)
        )
        made = rows if kind in ("short", "whole") else Masked(rows, mask, removed=kind == "removed")
        if name != "bert":
            return made
        return Reading(made, backbone.readout(["good", "bad"], "words"))

    count = {kind: flops(backbone, prompt(kind), encoded) for kind in ("whole", "zeroed", "removed", "short")}
    assert count["zeroed"] == count["whole"]
    assert count["removed"] == count["short"] < count["whole"]


# -- exchange -------------------------------------------------------------------------------------------


def causal() -> tuple[Backbone, InputPrompt]:
    backbone = wrap("llama", *tiny.build("llama"))
    return backbone, InputPrompt(
        backbone.geometry, 3, torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    )


@pytest.mark.parametrize("removed", [False, True])
def test_an_artifact_and_a_peft_folder_of_a_pruned_prompt(tmp_path: Path, removed: bool) -> None:
    backbone, rows = causal()
    mask = MASK.repeat_interleave(2, dim=1)
    prompt = Masked(rows, mask, removed)
    artifact.save(
        tmp_path / "a", prompt=prompt, backbone=backbone, name="a", task={"kind": "text", "input": "{text}"},
        pruned={"kept": prompt.kept, "numbers": 96},
    )  # fmt: skip
    saved = artifact.load(tmp_path / "a")
    assert saved.card["prompt"]["mask"] == ["1100", "0000", "1111"] and saved.card["pruned"]["kept"] == 48
    assert "pruned: 48 of 96 numbers kept" in files.read_bytes(tmp_path / "a" / "README.md").decode()
    again = saved.prompt(backbone)
    batch = collate([backbone.encode("red film", "good")], pad_id=backbone.pad_id)
    nll = backbone.loss(batch, prompt.injection())[0]
    assert torch.equal(backbone.loss(batch, again.injection())[0], nll)
    assert torch.equal(rows_of(tmp_path / "a", backbone), prompt.rows())  # the start "given"

    peft.write(again, backbone, tmp_path / "peft")
    there = files.load_tensors(tmp_path / "peft" / "adapter_model.safetensors")[0]["prompt_embeddings"]
    assert torch.equal(there, prompt.rows()) and len(there) == (2 if removed else 3)
    foreign = peft.read(tmp_path / "peft", backbone)
    assert foreign.injection().inputs.shape[1] >= len(there)
    with pytest.raises(InteropError, match="unknown kind"):
        peft.write(again, backbone, tmp_path / "other", "LORA")
