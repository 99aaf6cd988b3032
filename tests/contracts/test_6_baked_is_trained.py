"""Spec and tensors through JSON and safetensors bytes: difference 0. Baking a prompt changes no number."""

import json
from typing import Any

import torch
from safetensors.torch import load, save

from incipit.injection import Injection
from incipit.prompts import build


def parts(injection: Injection) -> dict[str, Any]:
    found: dict[str, Any] = {
        n: getattr(injection, n) for n in ("rows", "inputs", "live", "key_live", "behind", "within")
    }
    found["isolated"] = torch.tensor(injection.isolated)
    for site in injection.keys:
        found |= {f"{site}.k{i}": t for i, t in enumerate(injection.keys[site])}
        found |= {f"{site}.v{i}": t for i, t in enumerate(injection.values[site])}
    if injection.readout is not None:
        found |= {f"readout.{n}": getattr(injection.readout, n) for n in ("vectors", "bias", "live")}
        found["way"] = injection.readout.way()
    return {n: t for n, t in found.items() if t is not None}


def same(a: Injection, b: Injection) -> None:
    ours, theirs = parts(a), parts(b)
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        other = theirs[key]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key


def test_round_trip(world: Any, case: str) -> None:
    backbone, prompt = world.backbone(case), world.prompt(case)
    data = save({k: v.contiguous() for k, v in prompt.state_dict().items()})
    again = build(json.loads(json.dumps(prompt.spec())), backbone.geometry, backbone.embed)
    again.load_state_dict(load(data))
    same(prompt.injection(), again.injection())
    assert again.units() == prompt.units() and again.length == prompt.length
    assert again.trained_parameters == prompt.trained_parameters


def test_baked(world: Any, case: str) -> None:
    prompt = world.prompt(case)
    baked = prompt.bake()
    same(prompt.injection(), baked.injection())
    assert any(made in case for made in ("lstm", "mlp", "(rows)")) == (baked is not prompt)
    assert not any("layers" in key or "lstm" in key for key in baked.state_dict())
    with torch.no_grad():  # the baked prompt owns its numbers
        for parameter in prompt.parameters():
            parameter.zero_()
    if baked is not prompt:
        assert all(bool(p.abs().sum() > 0) for p in baked.parameters())
