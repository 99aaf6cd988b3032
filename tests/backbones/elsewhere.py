"""Another device than the CPU, played on the CPU: what runs there is run here, by rules as strict as a GPU's.

A tensor there is a wrapper around one here, with a device of its own ("there", in the place that torch keeps for
devices of others). An operation that mixes both fails, as it does on a GPU; so does float64, as it does on Apple's.
Answers that the host waits for are counted.

As a script: python elsewhere.py NAME...: these tiny backbones, here and there, give the same numbers.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from incipit.backbones import EncoderBackbone, GenerateOptions, tiny, wrap
from incipit.batch import Batch, Encoded, collate
from incipit.decode import stacked
from incipit.prompts import InputPrompt, PrefixPrompt, Prompt, Reading
from incipit.run.parts import objective
from incipit.train import ExampleStream, FitSettings, Trainee, fit


class Module(_DummyBackendModule):
    """What torch asks a device's module for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("there", backend_module=Module())
aten = torch.ops.aten
THERE = torch.device("there", 0)
MOVES = (aten.copy_.default, aten._to_copy.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
ASKED = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
waits = 0  # how often the host has asked the device for a number


class There(Tensor):
    """A tensor on THERE; `held` is the one on the CPU that it stands for."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=THERE
        )

    def __init__(self, held: Tensor) -> None:
        if held.dtype == torch.float64:
            raise TypeError("float64 on a device that has none")
        self.held = held

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"There({self.held!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        global waits
        if func in (Tensor.tolist, Tensor.data_ptr):
            waits += func is Tensor.tolist
            return func(args[0].held)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        global waits
        kwargs = kwargs or {}
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        home = kwargs.get("device") is not None and kwargs["device"].type == "cpu"
        waits += func in ASKED or home
        if func not in MOVES:
            if func in INDEXED and isinstance(args[0], There):  # a GPU takes indices from the host
                given = [t for t in given if all(t is not i for i in args[1])]
            assert all(isinstance(t, There) or not t.dim() for t in given), (
                f"{func} of tensors here and there"
            )
        held = {id(t.held): t for t in given if isinstance(t, There)}

        def inner(each: Any) -> Any:
            if isinstance(each, torch.device) and each.type == THERE.type:
                return torch.device("cpu")
            return each.held if isinstance(each, There) else each

        def outer(each: Any) -> Any:
            if not isinstance(each, Tensor) or any(each is t for t in given):
                return each
            return held[id(each)] if id(each) in held else each if home else There(each)

        return pytree.tree_map(outer, func(*pytree.tree_map(inner, args), **pytree.tree_map(inner, kwargs)))


def factories() -> Iterator[tuple[str, Any]]:
    """Every operation that makes a tensor on a device out of none."""
    for full in torch._C._dispatch_get_all_op_names():
        name, _, overload = full.removeprefix("aten::").partition(".")
        if not full.startswith("aten::") or not hasattr(aten, name):
            continue
        made = getattr(getattr(aten, name), overload or "default")
        kinds = {a.name: str(a.type) for a in made._schema.arguments}
        makes = [str(r.type) for r in made._schema.returns] == ["Tensor"]
        if makes and "device" in kinds and not any("Tensor" in kind for kind in kinds.values()):
            yield full.removeprefix("aten::"), made


def register() -> torch.library.Library:
    """Let torch make tensors on THERE; what is returned must live as long."""

    def kernel(made: Any) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: There(made(*args, **kwargs | {"device": torch.device("cpu")}))

    def filled(source: Tensor, to: Any, non_blocking: bool = False) -> Any:
        """torch.tensor(..., device=THERE)."""
        to.held.copy_(source)
        return to

    library = torch.library.Library("aten", "IMPL")
    for name, made in factories():
        library.impl(name, kernel(made), "PrivateUse1")
    library.impl("_copy_from", filled, "PrivateUse1")
    return library


# -- what is asked, here and there ----------------------------------------------------------------------------

SIZES = ((3, 1), (5, 2), (1, 3), (4, 1))  # tokens of input and target


def rows(backbone: Any) -> list[Encoded]:
    ids = backbone.frequent_ids(40)
    if isinstance(backbone, EncoderBackbone):
        return [Encoded(tuple(ids[:n]), choice=n % 2) for n, _ in SIZES]
    return [Encoded(tuple(ids[:n]), tuple(ids[n : n + u])) for n, u in SIZES]


def prompts(backbone: Any, kind: str) -> list[Prompt]:
    found = []
    for length in (2, 4):
        source = torch.Generator().manual_seed(length)
        made: Any = (InputPrompt if kind == "input" else PrefixPrompt)(backbone.geometry, length)
        made.set_rows(torch.randn(length, made.width, generator=source))
        if isinstance(backbone, EncoderBackbone):
            made = Reading(made, backbone.readout(["good", "bad"]))
        found.append(made.to(backbone.device))
    return found


def batch(backbone: Any, times: int = 1) -> Batch:
    made = collate(rows(backbone) * times, [0, 1, 1, 0] * times, pad_id=backbone.pad_id)
    return made.to(backbone.device)


def learned(backbone: Any, kind: str) -> list[Tensor]:
    """Losses, gradients, and where two steps of training end."""
    many, asked = prompts(backbone, kind), batch(backbone)
    nll, count = backbone.loss(asked, stacked(many, asked.rows))
    nll.sum().backward()
    grads = [p.grad for one in many for p in one.parameters()]
    examples = rows(backbone)
    trainees = [
        Trainee(str(k), one, ExampleStream(examples, lambda row: row, seed=k)) for k, one in enumerate(many)
    ]
    chosen = FitSettings(steps=2, batch=3, micro_batch=4, show=False)
    with tempfile.TemporaryDirectory() as folder:
        fit(trainees, objective(backbone, many), chosen, folder, collate)
    ends = [p.detach() for one in many for p in one.parameters()]
    return [t.cpu() for t in (nll.detach(), count, *grads, *ends)]


def answered(backbone: Any, kind: str) -> list[Any]:
    """Scores of candidates, next tokens, and what is written."""
    many, asked = prompts(backbone, kind), batch(backbone)
    ids, injection = backbone.frequent_ids(60), stacked(many, asked.rows)
    if isinstance(backbone, EncoderBackbone):
        return [backbone.class_logits(asked, injection).cpu()]
    found = [backbone.next_token(asked, injection).cpu()]
    for ends in (((1, 2), (3,), (3, 4, 5)), ((7,), (8,))):
        candidates = [[[ids[i] for i in one] for one in ends]] * len(asked)
        found.append(torch.tensor(backbone.choices(asked, injection, candidates)))
    return [*found, *(backbone.generate(asked, injection, GenerateOptions(3, beams=b)) for b in (1, 2))]


def asking(backbone: Any, times: int) -> int:
    """How often the host waits in a loss and in the scores of candidates of `times` as many rows."""
    global waits
    many, asked = prompts(backbone, "input"), batch(backbone, times)
    ids, injection = backbone.frequent_ids(60), stacked(many, asked.rows)
    waits = 0
    backbone.loss(asked, injection)
    if not isinstance(backbone, EncoderBackbone):
        for ends in ([[ids[1], ids[2]], [ids[3]]], [[ids[1]], [ids[3]]]):
            backbone.choices(asked, injection, [ends] * len(asked))
    return waits


def check(name: str) -> None:
    here = wrap(name, *tiny.build(name))
    model, tokenizer = tiny.build(name)
    there = wrap(name, model.to(THERE), tokenizer)
    assert there.device.type == THERE.type and there.notes == here.notes
    assert there.streams == here.streams and there.geometry.sites == here.geometry.sites
    for kind in ("input", "prefix") if there.geometry.sites else ("input",):
        for ask in (learned, answered):
            for a, b in zip(ask(here, kind), ask(there, kind), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    once, thrice = asking(there, 1), asking(there, 3)
    assert once == thrice, f"the host waits {once} times for 4 rows and {thrice} times for 12"
    print(name, "waits", once)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kept = register()
    for name in sys.argv[1:]:
        check(name)
