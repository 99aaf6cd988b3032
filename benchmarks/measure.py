"""Seconds of two sides taken in turn, memory of each in a process of its own, and how far their results differ."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import importlib
import multiprocessing
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

REPEATS = 5
TURN = 1.0  # seconds, at least, that a side goes on: training does not change sides at every step


@dataclass
class Outcome:
    """What a step gave, as far as it can be compared; seconds: what counts, where that is not the whole step."""

    loss: float | None = None
    gradient: Tensor | None = None
    logits: Tensor | None = None
    ids: Sequence[Sequence[int]] | None = None
    seconds: float | None = None


class Side(Protocol):
    """One of the two libraries, ready to run a workload."""

    def warm(self) -> None:
        """Whatever happens once."""

    def step(self) -> Outcome:
        """The workload."""


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    sides: Mapping[str, Side], device: torch.device, repeats: int, turn: float = TURN
) -> tuple[dict[str, list[float]], dict[str, Outcome]]:
    """Seconds of every turn and the last outcome, by side; the order turns round from one repeat to the next."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    last: dict[str, Outcome] = {}
    for side in sides.values():
        side.warm()
    for repeat in range(repeats):
        for name in list(sides) if repeat % 2 == 0 else list(sides)[::-1]:
            gc.collect()
            steps, last[name] = _turn(sides[name], device, turn)
            seconds[name].append(median(steps))
    return seconds, last


def _turn(side: Side, device: torch.device, turn: float) -> tuple[list[float], Outcome]:
    """Seconds of steps one after another until a turn is over, at least one; what the last of them gave."""
    steps: list[float] = []
    synchronise(device)
    begun = start = time.perf_counter()
    while not steps or start - begun < turn:
        found = side.step()
        synchronise(device)
        end = time.perf_counter()
        steps.append(end - start if found.seconds is None else found.seconds)
        start = end
    return steps, found


# -- equality ------------------------------------------------------------------------------------------------


def differences(ours: Outcome, peer: Outcome) -> dict[str, float]:
    """Relative difference of what both sides gave: |a - b| / |b|; for ids the share of tokens that differ."""
    found: dict[str, float] = {}
    if ours.loss is not None and peer.loss is not None:
        found["loss"] = abs(ours.loss - peer.loss) / abs(peer.loss)
    for name in ("gradient", "logits"):
        a, b = getattr(ours, name), getattr(peer, name)
        if a is not None and b is not None:
            found[name] = float((a.double() - b.double()).norm() / b.double().norm())
    if ours.ids is not None and peer.ids is not None:
        found["ids"] = _apart(ours.ids, peer.ids)
    return found


def _apart(ours: Sequence[Sequence[int]], peer: Sequence[Sequence[int]]) -> float:
    total = different = 0
    for a, b in zip(ours, peer, strict=True):
        total += max(len(a), len(b))
        different += sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))
    return different / max(1, total)


def unequal(found: Mapping[str, float], allowed: Mapping[str, float]) -> list[str]:
    """What is not equal, in words; a difference without a bound is a mistake of the benchmark."""
    return [
        f"{name} differs by {value:.2g}, at most {allowed[name]:.2g} is allowed"
        for name, value in found.items()
        if not value <= allowed[name]  # a NaN is unequal too
    ]


# -- memory --------------------------------------------------------------------------------------------------

PRELOAD = [
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "peft",
    "incipit.train",
    "incipit.decode",
]


def extra_memory(module: str, settings: Mapping[str, Any], side: str) -> int:
    """Bytes that one step needs beyond what was there before it, in a fresh process.

    On a CPU the peak of the resident set less the resident set before; on a GPU torch's own count.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, module, dict(settings), side))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = None
    process.join()
    if not isinstance(found, int):
        raise RuntimeError(f"the process that measures the memory of {side} ended without a figure: {found}")
    return found


def _child(sender: Any, module: str, settings: dict[str, Any], side: str) -> None:
    try:
        script = importlib.import_module(module)
        ready: Side = script.SIDES[side](settings)
        ready.warm()
        sender.send(_peak(ready, torch.device(settings["device"])))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")
        raise


def _peak(side: Side, device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        side.step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - int(before)
    _give_back()
    before = _resident("VmRSS")
    forgotten = _forget_peak()
    side.step()
    if forgotten:
        return max(0, _resident("VmHWM") - before)
    unit = 1 if sys.platform == "darwin" else 1024
    return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before)


def _give_back() -> None:
    """Freed memory that the allocator still holds would be used again unseen."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)


def _forget_peak() -> bool:
    """Start the kernel's count of the peak anew; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes; without /proc the peak so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))
