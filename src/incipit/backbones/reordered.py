"""x W^T with W reordered once: on a CPU the products with frozen weights then run nearer to their full rate.

# M rows, N outputs, H inputs
torch's own product puts W in the order that it reads best in every call; where M is small that takes as long as the
product. A weight that does not change is put in order once, as torch's compiler does for frozen models (torch 2.13,
oneDNN), and kept beside the model's. What is learned through, other devices and other types go on as they are.

A type of 16 bits that the processor does not multiply (bfloat16 without AVX512-BF16 or AMX) takes torch some thirty
times as long as float32. Products with such weights are done in float32 and rounded once, at the end: put in order
where the copies have room, else widened in every call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from incipit.backbones.hardware import ABLE, fast
from incipit.backbones.memory import total

SMALL = 2**16  # numbers of a weight below which there is nothing to gain
ALONE = 2**18  # the same for one row by itself: then the way to the product takes longer than the product
SHARE = 1 / 8  # of the machine's memory that the copies of one model may take


def attach(model: nn.Module) -> int:
    """Let linear layers do their products in order, or in float32, where that gains; returns how many in order."""
    chosen = {m: m.weight for m in model.modules() if type(m) is nn.Linear and _suits(m)}
    size = sum(4 * w.numel() for w in {id(w): w for w in chosen.values()}.values())
    kept = torch.backends.mkldnn.is_available() and size <= SHARE * total(torch.device("cpu"))
    for module, weight in chosen.items():
        if kept or weight.dtype in ABLE:
            module.register_forward_pre_hook(Reordered(kept))
    return len(chosen) if kept else 0


def _suits(module: nn.Linear) -> bool:
    weight, hooks = module.weight, module._forward_pre_hooks.values()
    plain = weight.device.type == "cpu" and type(weight.data) is Tensor
    gains = not fast(weight.dtype) if weight.dtype in ABLE else weight.numel() >= SMALL
    known = weight.dtype in (torch.float32, *ABLE)
    return plain and known and gains and not any(isinstance(h, Reordered) for h in hooks)


class _Order:
    """A frozen weight [N, H] in the order of x W^T and, once a gradient is asked for, in that of dy W."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self.blocks, self._back = _blocks(self.weight), torch.empty(0)

    def forth(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b."""
        return _times(x, self.blocks, bias)

    def back(self, grad: Tensor) -> Tensor:
        """dy W."""
        if self._back.layout == torch.strided:  # threads may meet here: both find the same
            self._back = _blocks(self.weight.T.contiguous())
        return _times(grad.contiguous(), self._back, None)


class _Wide:
    """A frozen weight [N, H] of 16 bits that is widened in every call: slower than in order, but without a copy."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()

    def forth(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b."""
        found = F.linear(x.float(), self.weight.float(), None if bias is None else bias.float())
        return found.to(x.dtype)

    def back(self, grad: Tensor) -> Tensor:
        """dy W."""
        return (grad.float() @ self.weight.float()).to(grad.dtype)


def _blocks(weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight.float(), 64
    )  # M: a hint, which changes little
    return found


def _times(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b. oneDNN compiles a product for every M and keeps it, half a megabyte each: so few M, zeros behind."""
    rows = x.numel() // x.shape[-1]
    more = padded(rows) - rows
    there = (F.pad(x.reshape(rows, -1), (0, 0, 0, more)) if more else x).float()
    wide = None if bias is None else bias.float()
    found: Tensor = torch.ops.mkldnn._linear_pointwise(there, blocks, wide, "none", [], "").to(x.dtype)
    return found[:rows].view(*x.shape[:-1], -1) if more else found


def padded(rows: int) -> int:
    """The next of 1 to 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ...: four to each power of two."""
    step = 1 << max(0, (rows - 1).bit_length() - 3)
    return -(-rows // step) * step


class _Product(torch.autograd.Function):
    """y = x W^T + b, dx = dy W; W and b learn nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: _Order | _Wide, bias: Tensor | None) -> Tensor:
        ctx.order = order
        return order.forth(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.order.back(grad), None, None


class _Given(Tensor):
    """The input `plain` of a linear layer on its way to the product with `weight`, which is then done in `order`."""

    plain: Tensor
    weight: Tensor
    order: _Order | _Wide

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args[0] if args else None
        if func is F.linear and isinstance(given, _Given) and args[1] is given.weight:
            bias = args[2] if len(args) > 2 else None
            if torch.is_grad_enabled() and given.plain.requires_grad:
                return _Product.apply(given.plain, given.order, bias)  # type: ignore[no-untyped-call]
            return given.order.forth(given.plain, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Reordered:
    """A hook before a linear layer that hands its input on as a `_Given`, where the layer itself does not learn.

    A weight that was changed in place is put in order anew; one that was changed through `.data` is not seen.
    """

    def __init__(self, ordered: bool = True) -> None:
        self.ordered = ordered
        self.kept: tuple[tuple[int, int], _Order | _Wide] | None = None

    def __call__(self, module: nn.Linear, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        x, weight, bias = args[0], module.weight, module.bias
        if x.numel() == x.shape[-1] and weight.numel() < ALONE and weight.dtype == torch.float32:
            return None
        learns = weight.requires_grad or (bias is not None and bias.requires_grad)
        if (learns and torch.is_grad_enabled()) or torch.is_autocast_enabled("cpu") or not x.numel():
            return None
        if (
            x.dtype != weight.dtype
            or weight.device.type != "cpu"
            or weight.dtype not in (torch.float32, *ABLE)
        ):
            return None
        state = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        kept = self.kept
        if kept is None or kept[0] != state:
            self.kept = kept = state, (_Order if self.ordered else _Wide)(weight)
        given = x.as_subclass(_Given)
        given.plain, given.weight, given.order = x, weight, kept[1]
        return (given,)

    def __getstate__(self) -> dict[str, Any]:
        return {"ordered": self.ordered, "kept": None}  # the order is this machine's
