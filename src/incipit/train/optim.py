"""Adafactor as in the paper, AdamW, and learning-rate schedules.

lr_p(t) = lr x schedule(t) x unit_p for every parameter p, times max(eps2, RMS(p)) with parameter scaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from incipit.errors import TrainingError, nearest
from incipit.train.muon import Muon

FACTORED_FROM = 128  # Shazeer and Stern's code keeps row and column means only where both sides reach this


@dataclass(frozen=True)
class OptimSettings:
    """What the optimiser and its schedule need; lr is in units of the trainee (`Trainee.units`)."""

    name: str = "adafactor"
    """"adafactor", "adamw" or "muon" (for the matrices between hidden states, AdamW for the rest)."""
    lr: float = 0.03
    """The rate, times the unit of each parameter."""
    schedule: str = "constant"
    """"constant", "linear" or "cosine"."""
    warmup: int = 0
    """Steps over which the rate rises linearly from lr / warmup."""
    decay: int = 0
    """linear, cosine: the rate falls over this many last steps; 0: over all steps after the warm-up."""
    floor: float = 0.0
    """The rate at the last step, as a share of lr."""
    weight_decay: float = 1e-5
    """adafactor: p times 1 - weight_decay each step; adamw, muon: p times 1 - rate times weight_decay."""
    parameter_scale: bool = False
    """The rate times max(1e-3, RMS of the parameter)."""
    step_offset: int = 0
    """adafactor: its steps are counted from here (the released code of the paper: 1,100,000)."""
    beta1: float = 0.9
    """adamw, muon: of the mean of gradients."""
    beta2: float = 0.999
    """adamw: of the mean of their squares."""

    def __post_init__(self) -> None:
        for value, known in ((self.name, OPTIMISERS), (self.schedule, SCHEDULES)):
            if value not in known:
                raise TrainingError(f"unknown optimiser or schedule {value!r}{nearest(value, known)}")
        if not self.lr > 0 or self.warmup < 0 or self.decay < 0:
            raise TrainingError(
                f"lr {self.lr}, warmup {self.warmup}, decay {self.decay}: need lr > 0, steps >= 0"
            )


def rms(tensor: Tensor) -> Tensor:
    """sqrt(mean(x^2)), a scalar."""
    return tensor.float().square().mean().sqrt()


class Adafactor(torch.optim.Optimizer):
    """u = g / sqrt(v), v = b v + (1 - b)(g^2 + eps1), b = 1 - t^-0.8; p = (1 - wd) p - lr u / max(1, RMS(u)).

    Shazeer and Stern 2018, algorithms 4 and 5; Lester et al. 2021, section 3: no momentum, no scaling.
    A matrix with both sides >= 128 keeps row and column means R, C instead of v: v = R C / mean(R).
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float = 0.3,
        weight_decay: float = 1e-5,
        parameter_scale: bool = False,
        step_offset: int = 0,
        decay_exponent: float = 0.8,
        clip: float = 1.0,
        eps1: float = 1e-30,
        eps2: float = 1e-3,
    ) -> None:
        kept = {"weight_decay": weight_decay, "parameter_scale": parameter_scale, "step_offset": step_offset}
        super().__init__(
            params, kept | {"lr": lr, "exponent": decay_exponent, "clip": clip, "eps1": eps1, "eps2": eps2}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "the loop computes the loss"
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad.float(), self.state[param], group)

    def _update(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        square = grad.square() + group["eps1"]
        factored = grad.ndim >= 2 and min(grad.shape[-2:]) >= FACTORED_FROM
        if not state:
            state["step"] = 0
            if factored:
                state["row"] = torch.zeros_like(square[..., 0])  # [..., R]
                state["column"] = torch.zeros_like(square[..., 0, :])  # [..., C]
            else:
                state["square"] = torch.zeros_like(square)
        state["step"] += 1
        fresh = (state["step"] + group["step_offset"]) ** -group["exponent"]  # 1 - beta2_t
        if factored:
            row = state["row"].lerp_(square.mean(-1), fresh)
            column = state["column"].lerp_(square.mean(-2), fresh)
            scale = (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(
                -2
            )  # [..., R, C]
        else:
            scale = state["square"].lerp_(square, fresh).rsqrt()
        update = grad * scale
        update /= (rms(update) / group["clip"]).clamp_min(1.0)
        rate = group["lr"] * (max(group["eps2"], float(rms(param))) if group["parameter_scale"] else 1.0)
        param.mul_(1 - group["weight_decay"]).add_(update.to(param.dtype), alpha=-rate)


def _adamw(groups: list[dict[str, Any]], settings: OptimSettings) -> list[torch.optim.Optimizer]:
    betas = (settings.beta1, settings.beta2)
    return [
        torch.optim.AdamW(
            groups, lr=settings.lr, betas=betas, weight_decay=settings.weight_decay, foreach=False
        )
    ]


def _adafactor(groups: list[dict[str, Any]], settings: OptimSettings) -> list[torch.optim.Optimizer]:
    offset = settings.step_offset
    return [Adafactor(groups, lr=settings.lr, weight_decay=settings.weight_decay, step_offset=offset)]


def _muon(groups: list[dict[str, Any]], settings: OptimSettings) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices between hidden states, AdamW for embeddings and vectors."""
    hidden = [g for g in groups if g["params"][0].ndim == 2 and not any(w in g["name"] for w in VOCABULARY)]
    rest = [g for g in groups if all(g is not h for h in hidden)]
    found: list[torch.optim.Optimizer] = []
    if hidden:
        found.append(
            Muon(hidden, lr=settings.lr, momentum=settings.beta1, weight_decay=settings.weight_decay)
        )
    return [*found, *(_adamw(rest, settings) if rest else [])]


VOCABULARY = ("embed", "shared", "lm_head", "relative_attention_bias")  # not matrices between hidden states
OPTIMISERS = {"adafactor": _adafactor, "adamw": _adamw, "muon": _muon}


def _falling(kind: str, done: float) -> float:
    """1 at done = 0, 0 at done = 1."""
    return 1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))


SCHEDULES = ("constant", "linear", "cosine")


def factor(settings: OptimSettings, step: int, steps: int) -> float:
    """Share of lr at step t = 1..T: rise over `warmup`, stay, fall over the last `decay` steps."""
    rise = min(1.0, step / settings.warmup) if settings.warmup else 1.0
    if settings.schedule == "constant":
        return rise
    decay = settings.decay or max(1, steps - settings.warmup)
    done = min(1.0, max(0.0, (step - (steps - decay)) / decay))
    return rise * (settings.floor + (1 - settings.floor) * _falling(settings.schedule, done))


class Optimiser:
    """One trainee's optimiser: `step(t, T)` updates all its parameters; `state()` is tensors by name."""

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        settings: OptimSettings,
        units: Mapping[str, float],
        lr: float | None,
    ) -> None:
        unknown = set(units) - set(params)
        if unknown:
            raise TrainingError(
                f"units name no trained parameter: {', '.join(sorted(unknown))}; known: {', '.join(params)}"
            )
        self.settings, self.params, self.lr = settings, dict(params), settings.lr if lr is None else lr
        self.units = {name: float(units.get(name, 1.0)) for name in params}
        groups = [{"params": [param], "name": name} for name, param in params.items()]
        self.parts = OPTIMISERS[settings.name](groups, settings)

    def step(self, step: int, steps: int) -> float:
        """Update with the present gradients; returns lr x schedule (before units)."""
        rate = self.lr * factor(self.settings, step, steps)
        for part in self.parts:
            for group in part.param_groups:
                scale = (
                    max(1e-3, float(rms(group["params"][0].detach())))
                    if self.settings.parameter_scale
                    else 1.0
                )
                group["lr"] = rate * self.units[group["name"]] * scale
                if not isinstance(
                    part, Adafactor
                ):  # torch multiplies the decay by the group's rate: undo the scale
                    group["weight_decay"] = self.settings.weight_decay / (self.units[group["name"]] * scale)
            part.step()
        return rate

    def state(self) -> dict[str, Tensor]:
        """Every state tensor as "name/key"; numbers become 0-d float64 tensors."""
        found = {}
        for part in self.parts:
            for group in part.param_groups:
                for key, value in part.state[group["params"][0]].items():
                    tensor = (
                        value
                        if isinstance(value, Tensor)
                        else torch.tensor(float(value), dtype=torch.float64)
                    )
                    found[f"{group['name']}/{key}"] = tensor
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state()`."""
        for part in self.parts:
            for group in part.param_groups:
                param, prefix = group["params"][0], f"{group['name']}/"
                own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                for key, value in own.items():
                    number = value.dtype == torch.float64 and value.ndim == 0
                    device = (
                        value.device if key == "step" else param.device
                    )  # AdamW counts its steps on the CPU
                    part.state[param][key] = int(value) if number else value.to(device, copy=True)
