"""LoRA and IA3 by PEFT on the loop that trains prompts: they learn, count their numbers, and leave the rest alone."""

from pathlib import Path

import pytest
import torch

from incipit.backbones import load, tiny
from incipit.backbones.load import wrap
from incipit.batch import Encoded, collate
from incipit.errors import BackboneError, RecipeError
from incipit.recipe import Recipe
from incipit.run import tune
from incipit.run.adapters import adapt


def recipe(backbone: str, method: str, **train: object) -> Recipe:
    return Recipe.of(
        {
            "name": "a",
            "backbone": {"name": backbone, "device": "cpu"},
            "prompt": {"kind": "none"},
            "task": {"builtin": "reviews", "limit": 12},
            "train": {
                "method": method,
                "steps": 4,
                "batch": 3,
                "eval_every": 2,
                "optimiser": "adamw",
                **train,
            },
        }
    )


@pytest.mark.parametrize("family", ["t5", "llama", "bert"])
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_adapters_are_all_that_is_trained(tmp_path: Path, family: str, method: str) -> None:
    tiny.save(family, tmp_path / family)
    backbone = load(str(tmp_path / family))
    frozen = {name: p.detach().clone() for name, p in backbone.model.named_parameters()}
    (done,) = tune(
        [recipe(str(tmp_path / family), method, lr=0.01)], tmp_path / "run", show=False, backbone=backbone
    )
    now = dict(backbone.model.named_parameters())
    added = {name: p for name, p in now.items() if method in name}
    kept = {name.replace(".base_layer", ""): p for name, p in now.items() if name not in added}
    assert kept.keys() == frozen.keys() and all(torch.equal(kept[name], frozen[name]) for name in frozen)
    assert added and done.record["parameters"] == sum(p.numel() for p in added.values())
    assert not done.place and set(done.scores) == {"validation", "test"}
    if method == "ia3":  # l starts at 1
        assert any(not torch.equal(p, torch.ones_like(p)) for p in added.values())
    else:  # B starts at 0
        assert any(p.abs().max() > 0 for name, p in added.items() if "lora_B" in name)


def test_the_rank_counts(tmp_path: Path) -> None:
    sizes = []
    for rank in (2, 4):
        model, _ = tiny.build("llama")
        adapt(model, "lora", rank, seed=0)
        sizes.append(sum(p.numel() for name, p in model.named_parameters() if "lora" in name))
    assert sizes[1] == 2 * sizes[0]


def test_what_does_not_go() -> None:
    with pytest.raises(RecipeError, match="PEFT has no layers to adapt in a Linear"):
        adapt(torch.nn.Linear(2, 2), "lora", 8, seed=0)
    with pytest.raises(RecipeError, match=r'train.rank: .*got 4.*train.method = "lora"'):
        recipe("t5", "ia3", rank=4)


def test_a_sentinel_stands_before_every_target() -> None:
    backbone = wrap("t5", *tiny.build("t5"))
    plain = backbone.encode("a b", "good")
    backbone.lead_with("<extra_id_0>")
    led = backbone.encode("a b", "good")
    (first,) = backbone.text_ids("<extra_id_0>")
    assert led.target_ids == (first, *plain.target_ids) and led.input_ids == plain.input_ids
    assert backbone.decode(led.target_ids) == backbone.decode(plain.target_ids)  # left out of what is written
    assert backbone.encode("a b").target_ids == ()
    for name, token in (("t5", "good"), ("t5", "<extra_id_0> good"), ("llama", "<extra_id_0>")):
        with pytest.raises(BackboneError, match="cannot stand before the targets"):
            wrap(name, *tiny.build(name)).lead_with(token)
    backbone.lead_with("")
    assert backbone.encode("a b", "good") == plain


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_adapters_act_in_every_attention(method: str) -> None:
    """Short targets are read by the bare weights of a cross-attention where it is plain; adapters come in later."""
    backbone = wrap("t5", *tiny.build("t5"))
    assert backbone.folds  # type: ignore[attr-defined]
    adapt(backbone.model, method, 2, seed=0)
    source = torch.Generator().manual_seed(0)
    added = {name: p for name, p in backbone.model.named_parameters() if method in name}
    with torch.no_grad():
        for parameter in added.values():  # the B of LoRA starts at 0, the l of IA3 at 1
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=source))
    row = Encoded((5, 6, 7), (8, 9))
    nll = backbone.loss(collate([row]), None)[0].sum()
    labels = torch.tensor([row.target_ids])
    whole = 2 * backbone.model(input_ids=torch.tensor([row.input_ids]), labels=labels).loss
    torch.testing.assert_close(nll, whole, rtol=1e-4, atol=1e-4)
    nll.backward()
    assert not [name for name, p in added.items() if p.grad is None]
