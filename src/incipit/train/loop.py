"""The one loop: K trainees step together over one objective, be they prompts, a backbone, or a pre-training.

loss_k = sum nll / sum count over trainee k's rows of a step, however they are split (gradients.py).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from incipit import files
from incipit.errors import Interrupted, TrainingError
from incipit.train import checkpoint, progress
from incipit.train.gradients import Collate, Objective, Parts, accumulate, sum_over_processes
from incipit.train.trainee import FREE, FitSettings, Outcome, Runner, Trainee

Evaluate: TypeAlias = Callable[[Sequence[int]], Mapping[int, dict[str, float]]]


def fit(
    trainees: Sequence[Trainee],
    objective: Objective,
    settings: FitSettings,
    folder: files.PathLike,
    collate: Collate,
    *,
    evaluate: Evaluate | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    allow: Sequence[str] = (),
    after_save: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Train all trainees together; each ends where it would end alone.

    evaluate(indices of trainees) -> index -> dev scores, the first of which is THE metric; a trainee without a
    dev split is left out. It is called once for all trainees that have not stopped, so they can share a batch.
    identity: whatever else must be equal when the run is resumed (recipe, fingerprint, data hash); `allow`
    names settings ("settings.steps") that may differ all the same. after_save(step) follows each checkpoint.
    Raises TrainingError on a loss or gradient that is not finite, Interrupted after Ctrl-C (the state is
    saved). A rate, unit or shape belongs to one trainee; everything in `settings` to all.
    """
    folder, accelerator = Path(folder), Accelerator()
    main = accelerator.is_main_process  # the only process that writes
    runners = _runners(trainees, settings)
    device = next(iter(runners[0].params.values())).device
    same = _identity(runners, settings, identity or {})
    start, seconds = _resume(folder, runners, same, resume, allow, main)
    accelerator.wait_for_everyone()  # all have read the folder before the main process writes there
    shown = progress.Progress(
        folder, settings.steps, start, seconds, main, settings.show, settings.tensorboard
    )
    parts = Parts(settings.micro_batch, settings.slots, settings.more, settings.waste)
    saved = time.monotonic()
    with _interrupts() as asked, shown:
        if resume:
            shown.resumed()
        for step in range(start + 1, settings.steps + 1):
            live = {k: r for k, r in enumerate(runners) if not r.stopped}
            if not live:
                break

            # every trainee's rows, one backward for all of them
            rows = [(k, row) for k, r in live.items() for row in r.trainee.stream.next(settings.batch)]
            sums = accumulate(
                rows, len(runners), objective, collate, accelerator, device,
                parts=parts, precision=settings.precision, asked=bool(asked),
            )  # fmt: skip
            sum_over_processes([p for r in live.values() for p in r.params.values()], accelerator)

            # every trainee's own mean, clip and optimiser
            rates = {
                r.trainee.name: r.update(step, sums.nll[k], sums.count[k], sums.bad.get(k, []))
                for k, r in live.items()
            }
            last = step == settings.steps
            recorded = last or step % settings.log_every == 0
            losses = {r.trainee.name: r.window_loss() for r in live.values()} if recorded else None
            shown.step(step, sums.tokens, losses, rates)

            # every trainee's dev score, best tensors and patience
            if evaluate and (last or (settings.eval_every and step % settings.eval_every == 0)):
                _judge(live, evaluate, step, shown, accelerator)

            # one state for the whole run
            over = last or all(r.stopped for r in runners)
            late = 0 < 60 * settings.save_minutes < time.monotonic() - saved
            if over or late or sums.asked or (settings.save_every and step % settings.save_every == 0):
                if main:
                    checkpoint.save(folder, _state(step, same, runners, shown))
                    if after_save is not None:
                        after_save(step)
                saved = time.monotonic()
            if sums.asked and not over:
                raise Interrupted(
                    f"interrupted after step {step} of {settings.steps}; the state is saved in "
                    f"{str(folder)!r}: run the same command with --resume to go on"
                )
    return [r.outcome() for r in runners]


def _runners(trainees: Sequence[Trainee], settings: FitSettings) -> list[Runner]:
    """One Runner each; names must differ, for they name the tensors of the checkpoint."""
    names = [t.name for t in trainees]
    if not names or len(set(names)) < len(names) or any("/" in n for n in names):
        raise TrainingError(f"trainees {names}: give one or more, with different names without '/'")
    return [Runner(t, settings) for t in trainees]


def _judge(
    live: Mapping[int, Runner],
    evaluate: Evaluate,
    step: int,
    shown: progress.Progress,
    accelerator: Accelerator,
) -> None:
    """Dev scores of all live trainees; the main process's scores count for all."""
    with torch.no_grad():
        scores = [dict(evaluate(list(live)))]
    if accelerator.num_processes > 1:
        broadcast_object_list(scores)
    for k, runner in live.items():
        if k in scores[0]:
            shown.evaluated(step, runner.trainee.name, scores[0][k], runner.judge(step, scores[0][k]))


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
        files.remove_parts(folder)
    return (state.step, state.seconds) if state else (0, 0.0)


def _identity(runners: Sequence[Runner], settings: FitSettings, more: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same when a run goes on: settings, trainees, shapes, and whatever the caller adds."""
    fixed = {k: v for k, v in asdict(settings).items() if k not in FREE}
    shapes = {
        r.trainee.name: {n: list(p.shape) for n, p in r.params.items()}
        | {"lr": r.optimiser.lr, "units": dict(r.optimiser.units)}
        | ({} if r.trainee.match is None else {"match": r.trainee.match})
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
