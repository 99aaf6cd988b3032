"""What a run says while it goes: a live line on a terminal, plain lines in a log, JSONL records always.

Records (metrics.jsonl): {"step", "trainee", "loss", "lr", "tokens", "seconds"} every `log_every` steps, and
{"step", "trainee", "scores", "seconds"} at every evaluation on the dev split.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from incipit import files
from incipit.errors import TrainingError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

FILE = "metrics.jsonl"
SHOWN = 4  # trainees that a line names one by one; more are shown as their mean


class Progress:
    """Show and record. `main` is False in all processes but one, which then stay silent and write nothing."""

    def __init__(
        self,
        folder: Path,
        steps: int,
        start: int = 0,
        seconds: float = 0.0,
        main: bool = True,
        show: bool = True,
        tensorboard: bool = False,
    ) -> None:
        self.path, self.steps, self.start = folder / FILE, steps, start
        self.main, self.show = main, show and main
        self.before, self.began = seconds, time.monotonic()
        self.tokens = 0
        self.scores: dict[str, float] = {}
        self._board = _tensorboard(folder) if tensorboard and main else None
        self._console: Console | None = None
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        if self.show:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._console = Console(stderr=True, highlight=False, soft_wrap=True)
            if self._console.is_terminal:
                columns = (
                    MofNCompleteColumn(),
                    BarColumn(24),
                    TimeRemainingColumn(),
                    TextColumn("{task.description}"),
                )
                self._bar = Bar(*columns, console=self._console)
                self._task = self._bar.add_task("", total=self.steps, completed=self.start)
                self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()

    @property
    def seconds(self) -> float:
        """Wall time of the run, earlier parts of a resumed one included."""
        return self.before + time.monotonic() - self.began

    def resumed(self) -> None:
        """Once, where a run was to go on: from where it does."""
        if self._console is not None:
            before = (
                f"goes on after step {self.start}" if self.start else "holds no checkpoint: starts at step 1"
            )
            self._console.print(f"{self.path.parent} {before}", markup=False)

    def step(
        self, step: int, tokens: int, losses: Mapping[str, float] | None, rates: Mapping[str, float]
    ) -> None:
        """After every step: `tokens` it read; `losses` by trainee where they are due for a record."""
        self.tokens += tokens
        if losses is not None:
            for name, loss in losses.items():
                self._record(step, name, {"loss": loss, "lr": rates[name], "tokens": tokens})
            line = self._line(step, losses)
            if self._bar is not None:
                self._bar.update(self._task, completed=step, description=line)
            elif self._console is not None:
                self._console.print(
                    f"step {step}/{self.steps}  {line}  left {self._left(step)}", markup=False
                )
        elif self._bar is not None:
            self._bar.update(self._task, completed=step)

    def evaluated(self, step: int, name: str, scores: Mapping[str, float], better: bool) -> None:
        """After an evaluation: its scores (the first is THE metric)."""
        metric, value = next(iter(scores.items()))
        self.scores[name] = value
        self._record(step, name, {"scores": dict(scores), "best": better})
        if self._console is not None and len(self.scores) <= SHOWN:
            note = "  (best so far)" if better else ""
            self._console.print(f"step {step}  {name}  dev {metric} {value:.4f}{note}", markup=False)

    def _record(self, step: int, name: str, values: Mapping[str, Any]) -> None:
        if self.main:
            files.append_jsonl(
                self.path, {"step": step, "trainee": name, **values, "seconds": round(self.seconds, 2)}
            )
        if self._board is not None:
            for key, value in {**values, **values.get("scores", {})}.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{name}/{key}", value, step)

    def _line(self, step: int, losses: Mapping[str, float]) -> str:
        speed = self.tokens / max(1e-9, time.monotonic() - self.began)
        if len(losses) <= SHOWN:
            dev = {n: f" dev {self.scores[n]:.4f}" if n in self.scores else "" for n in losses}
            told = "  ".join(f"{n} loss {loss:.4f}{dev[n]}" for n, loss in losses.items())
        else:
            told = f"{len(losses)} trainees, mean loss {sum(losses.values()) / len(losses):.4f}"
        return f"{told}  {speed:,.0f} tokens/s"

    def _left(self, step: int) -> str:
        """Minutes and seconds at the speed of this part of the run."""
        per_step = (time.monotonic() - self.began) / max(1, step - self.start)
        minutes, seconds = divmod(round(per_step * (self.steps - step)), 60)
        return f"{minutes}:{seconds:02d}"


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError(
            "TensorBoard is not installed: `pip install tensorboard`, or turn it off"
        ) from error
    return SummaryWriter(str(folder / "tensorboard"))
