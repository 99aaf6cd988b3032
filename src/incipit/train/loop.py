"""The one loop: K trainees step together over one objective; a prompt, a whole backbone and pre-training alike.

# K trainees, B rows of a micro-batch
loss_k = sum nll / sum count over trainee k's rows of a step, however they are split into micro-batches and processes.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from incipit import files
from incipit.batch import Batch, Encoded
from incipit.errors import Interrupted, TrainingError
from incipit.train import checkpoint, progress
from incipit.train.trainee import REMEDY, FitSettings, Outcome, Runner, Trainee

Objective = Callable[[Batch], tuple[Tensor, Tensor]]  # (nll [B] summed over a row's label tokens, count [B])
Collate = Callable[[Sequence[Encoded], Sequence[int]], Batch]
FREE = (
    "micro_batch",
    "save_every",
    "save_minutes",
    "show",
    "tensorboard",
)  # may change between parts of a run


def fit(
    trainees: Sequence[Trainee],
    objective: Objective,
    settings: FitSettings,
    folder: files.PathLike,
    collate: Collate,
    *,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    allow: Sequence[str] = (),
    after_save: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Train all trainees together; each ends where it would end alone.

    identity: whatever else must be equal when the run is resumed (recipe, fingerprint, data hash); `allow` names
    settings ("settings.steps") that may differ all the same. after_save(step) runs after each checkpoint.
    Raises TrainingError on a loss or gradient that is not finite, Interrupted after Ctrl-C (the state is saved).
    """
    folder, accelerator = Path(folder), Accelerator()
    runners = [Runner(t, settings) for t in trainees]
    device = next(iter(runners[0].params.values())).device
    same = _identity(runners, settings, identity or {})
    start, seconds = _resume(folder, runners, same, resume, allow, accelerator.is_main_process)
    shown = progress.Progress(
        folder, settings.steps, start=start, seconds=seconds, main=accelerator.is_main_process, show=settings.show,
        tensorboard=settings.tensorboard,
    )  # fmt: skip
    saved = time.monotonic()
    with _interrupts() as asked, shown:
        for step in range(start + 1, settings.steps + 1):
            live = [k for k, r in enumerate(runners) if not r.plain["stopped"]]
            if not live:
                break
            rows = [(k, e) for k in live for e in runners[k].trainee.stream.next(settings.batch)]
            totals, bad = _gradients(
                rows, objective, collate, settings, accelerator, device, len(runners), bool(asked)
            )
            _sum_gradients([runners[k] for k in live], accelerator)
            rates, last = {}, step == settings.steps
            for k in live:
                nll, count = totals[k].tolist()
                if not math.isfinite(nll):
                    where = f" (rows {', '.join(bad[k][:8])})" if bad.get(k) else ""
                    name = runners[k].trainee.name
                    raise TrainingError(
                        f"the loss of trainee {name!r} is not finite at step {step}{where}. {REMEDY}"
                    )
                rates[runners[k].trainee.name] = runners[k].update(step, count, nll)
            due = last or step % settings.log_every == 0
            losses = {runners[k].trainee.name: runners[k].window_loss() for k in live} if due else None
            shown.step(step, int(totals[-1, 1]), losses, rates)
            if last or (settings.eval_every and step % settings.eval_every == 0):
                for k in live:
                    _evaluate(runners[k], step, shown, accelerator)
            stop = totals[-1, 0] > 0  # some process was asked to stop before this step
            late = settings.save_minutes and time.monotonic() - saved > 60 * settings.save_minutes
            done = last or all(r.plain["stopped"] for r in runners)
            if stop or late or done or (settings.save_every and step % settings.save_every == 0):
                if accelerator.is_main_process:
                    checkpoint.save(folder, _state(step, same, runners, shown))
                    if after_save is not None:
                        after_save(step)
                saved = time.monotonic()
            if stop and not done:
                raise Interrupted(f"interrupted after step {step} of {settings.steps}; the state is saved in {str(folder)!r}: resume the run to go on")  # fmt: skip
    return [r.outcome() for r in runners]


def _gradients(
    rows: list[tuple[int, Encoded]], objective: Objective, collate: Collate, settings: FitSettings,
    accelerator: Accelerator, device: torch.device, trainees: int, asked: bool,
) -> tuple[Tensor, dict[int, list[str]]]:  # fmt: skip
    """Backward of the summed nll of this process's share; ([K + 1, 2] sums of nll and count over all processes, bad rows).

    The last row of the sums holds (processes asked to stop, tokens read).
    """
    share = rows[accelerator.process_index :: accelerator.num_processes]
    share.sort(
        key=lambda row: (len(row[1].input_ids), len(row[1].target_ids))
    )  # near-equal lengths pad little
    totals = torch.zeros(trainees + 1, 2, dtype=torch.float64)
    bad: dict[int, list[str]] = {}
    size = settings.micro_batch or len(share)
    for first in range(0, len(share), max(1, size)):
        part = share[first : first + size]
        batch = collate([e for _, e in part], [k for k, _ in part]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            nll, count = objective(batch)
        nll.sum().backward()  # type: ignore[no-untyped-call]
        sums = torch.stack([nll.detach().double().cpu(), count.double().cpu()], dim=1)  # [B, 2]
        totals.index_add_(0, batch.rows.cpu(), sums)
        totals[-1, 1] += int(batch.input_mask.sum() + batch.target_mask.sum())
        for i in (~sums[:, 0].isfinite()).nonzero().flatten().tolist():
            bad.setdefault(part[i][0], []).append(part[i][1].source or "of unknown source")
    totals[-1, 0] = float(asked)
    return accelerator.reduce(totals.to(device), "sum").cpu(), bad


def _sum_gradients(runners: Sequence[Runner], accelerator: Accelerator) -> None:
    """Sum every gradient over the processes."""
    if accelerator.num_processes == 1:
        return
    params = [p for r in runners for p in r.params.values()]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
    parts = accelerator.reduce(flat, "sum").split([p.numel() for p in params])
    for param, part in zip(params, parts, strict=True):
        param.grad = part.view_as(param).clone()


def _evaluate(runner: Runner, step: int, shown: progress.Progress, accelerator: Accelerator) -> None:
    """Dev scores of one trainee; the main process's scores count for all."""
    if runner.trainee.evaluate is not None:
        with torch.no_grad():
            scores = [runner.trainee.evaluate()]
        if accelerator.num_processes > 1:
            broadcast_object_list(scores)
        shown.evaluated(step, runner.trainee.name, scores[0], runner.judge(step, scores[0]))


def _state(
    step: int, same: dict[str, Any], runners: Sequence[Runner], shown: progress.Progress
) -> checkpoint.State:
    """The whole run after `step`."""
    state = checkpoint.State(step, same, records=files.file_size(shown.path), seconds=shown.seconds)
    for runner in runners:
        runner.store(state)
    state.put(checkpoint.rng_tensors(), "rng")
    return state


def _resume(
    folder: Path,
    runners: Sequence[Runner],
    same: dict[str, Any],
    resume: bool,
    allow: Sequence[str],
    main: bool,
) -> tuple[int, float]:
    """(step, seconds) of the checkpoint that the runners now hold; (0, 0) at the start of a run."""
    if not resume and (files.exists(folder / checkpoint.FILE) or files.exists(folder / progress.FILE)):
        raise TrainingError(f"{str(folder)!r} holds a run already: resume it, or choose another folder")
    state = checkpoint.load(folder)
    if state is not None:
        checkpoint.require_same(state.identity, same, allow)
        for runner in runners:
            runner.restore(state)
        checkpoint.restore_rng(state.group("rng"))
    if main:  # records written after the checkpoint will be written again
        files.truncate(folder / progress.FILE, state.records if state else 0)
    return (state.step, state.seconds) if state else (0, 0.0)


def _identity(runners: Sequence[Runner], settings: FitSettings, more: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same when a run goes on: settings, trainees, shapes, and whatever the caller adds."""
    fixed = {k: v for k, v in asdict(settings).items() if k not in FREE}
    shapes = {
        r.trainee.name: {n: list(p.shape) for n, p in r.params.items()}
        | {"lr": r.optimiser.lr, "units": dict(r.optimiser.units)}
        for r in runners
    }
    return {"settings": fixed, "trainees": shapes, **more}


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that is no longer empty once Ctrl-C or SIGTERM came; a second Ctrl-C stops at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield asked
        return

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
