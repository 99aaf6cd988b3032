"""Nothing is written on a module while it runs, so threads with different prompts do not meet."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from incipit.backbones import Backbone, GenerateOptions, tiny


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Every attribute of every module; tensors by identity and version, containers by their contents."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if isinstance(value, dict):
                held = [(k, id(v), getattr(v, "_version", 0)) for k, v in value.items()]
            else:
                held = [("", id(value), getattr(value, "_version", 0))]
            found[f"{name}.{key}"] = (held, repr(value) if not isinstance(value, nn.Module | dict) else "")
    return found


def refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError(f"written during a forward: {args[1:]}")


def test_nothing_is_written(world: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, prompt, encoded = world.backbone(case), world.prompt(case), world.rows(case)
    batch, backbone_before = world.batch(case, encoded), snapshot(backbone.model)
    own = dict(vars(backbone))
    with monkeypatch.context() as patch:
        for method in ("__setattr__", "__delattr__", "register_buffer", "register_forward_hook"):
            patch.setattr(nn.Module, method, refuse)
        patch.setattr(nn.Module, "register_forward_pre_hook", refuse)
        patch.setattr(Backbone, "__setattr__", refuse, raising=False)
        injection = prompt.injection()
        backbone.loss(batch, injection)[0].sum().backward()
        if backbone.family != "encoder" and "(" not in case:
            backbone.next_token(batch, injection)
            backbone.generate(batch, injection, GenerateOptions(max_new_tokens=2, beams=2))
    assert snapshot(backbone.model) == backbone_before
    assert vars(backbone) == own


KINDS = {"causal": ["input", "prefix@decoder"], "encoder-decoder": ["input", "prefix@encoder+decoder+cross"]}
SHARED = [f"{n}/{k}" for f, ks in KINDS.items() for n in tiny.names(f) for k in ks]  # type: ignore[arg-type]
SHARED += [f"{n}/verbalizer:{k}" for n in tiny.names("encoder") for k in ("input", "prefix@encoder")]
SHARED.remove("deberta-v2/verbalizer:prefix@encoder")


@pytest.mark.parametrize("shared", SHARED)
def test_threads_do_not_meet(world: Any, shared: str) -> None:
    backbone, encoded = world.backbone(shared), world.rows(shared, count=3)
    prompts = [world.prompt(shared, length=length, seed=length) for length in (5, 2, 4)]
    options = GenerateOptions(max_new_tokens=2, sample=True, seed=3)

    def run(k: int) -> Any:
        torch.set_num_threads(1)
        batch = world.batch(shared, encoded)
        nll = backbone.loss(batch, prompts[k].injection())[0]
        (slope,) = torch.autograd.grad(nll.sum(), next(iter(prompts[k].parameters())))
        text = (
            backbone.generate(batch, prompts[k].injection(), options) if backbone.family != "encoder" else []
        )
        return nll.tolist(), slope.tolist(), text

    alone = [run(k) for k in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, [0, 1, 2] * 2)) == alone * 2
