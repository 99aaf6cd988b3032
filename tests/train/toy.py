"""A frozen table of 11 words and prompts of 6 numbers: a whole training problem that runs in milliseconds.

As a script: python toy.py FOLDER [--resume] [--slow]: two prompts, 40 steps, a checkpoint every 3 steps.
"""

import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from incipit.batch import IGNORE, Batch, Encoded, collate
from incipit.train import ExampleStream, FitSettings, OptimSettings, Outcome, Trainee, fit

VOCABULARY, HIDDEN = 11, 6
TABLE = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0))


class Prompt(nn.Module):
    """Six trained numbers and one frozen one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed)))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)


def objective(prompts: list[Prompt]):
    """nll of the target words under softmax((mean of the input words + prompt) TABLE^T)."""

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        mask = batch.input_mask[..., None].float()
        mean = (TABLE[batch.input_ids] * mask).sum(1) / mask.sum(1)  # [B, H]
        starts = torch.stack([p.start * p.frozen for p in prompts])[batch.rows]  # [B, H]
        logits = (mean + starts) @ TABLE.T  # [B, V]
        kept = batch.labels != IGNORE
        each = logits.log_softmax(-1).gather(1, batch.labels.clamp_min(0))  # [B, U]
        return -(each * kept).sum(1), kept.sum(1)

    return run


def rows(seed: int, count: int = 23) -> list[Encoded]:
    """Rows of 1 to 5 input words and 1 to 3 target words that depend on the first input word."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        words = torch.randint(
            1, VOCABULARY, (int(torch.randint(1, 6, (1,), generator=generator)),), generator=generator
        )
        target = tuple([(int(words[0]) * 3) % VOCABULARY] * (1 + i % 3))
        found.append(Encoded(tuple(words.tolist()), target, source=f"toy.jsonl:{i + 1}"))
    return found


@torch.no_grad()
def dev(trainee: Trainee) -> dict[str, float]:
    """Scores of one trainee on rows that none is trained on."""
    nll, words = objective([trainee.module])(collate(rows(99)))  # type: ignore[list-item]
    return {"loss": float(nll.sum() / words.sum()), "words": float(words.sum())}


def judge(many: list[Trainee]):
    """`evaluate` of fit."""
    return lambda live: {k: dev(many[k]) for k in live}


def trainees(count: int = 2, *, lr: float | None = None) -> list[Trainee]:
    """`count` prompts, each with its own start and its own order of rows."""
    return [
        Trainee(f"p{k}", Prompt(k), ExampleStream(rows(k), lambda row: row, seed=k), {"start": 0.5}, lr)
        for k in range(count)
    ]


def settings(**changes: object) -> FitSettings:
    values = {"steps": 40, "batch": 5, "eval_every": 7, "best": "min", "log_every": 2, "show": False}
    values |= {"optim": OptimSettings("adamw", lr=0.2, schedule="cosine", warmup=4)}
    return FitSettings(**{**values, **changes})  # type: ignore[arg-type]


def train(
    folder: Path, many: list[Trainee], chosen: FitSettings, *, slow: float = 0.0, **more: object
) -> list[Outcome]:
    prompts = [t.module for t in many]

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        time.sleep(slow)
        return objective(prompts)(batch)  # type: ignore[arg-type]

    more.setdefault("evaluate", judge(many))
    return fit(many, run, chosen, folder, collate, **more)  # type: ignore[arg-type]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pace = 0.02 if "--slow" in sys.argv else 0.0
    train(Path(sys.argv[1]), trainees(), settings(save_every=3), slow=pace, resume="--resume" in sys.argv)
    print(f"one of {os.environ.get('WORLD_SIZE', '1')} processes")
