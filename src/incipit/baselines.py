"""What a prompt has to beat: nearest class mean for encoders, demonstrations for generative models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from incipit.backbones import Backbone, EncoderBackbone
from incipit.batch import collate
from incipit.decode import stacked
from incipit.encode import encode
from incipit.errors import DataError
from incipit.evaluation import DecodeOptions, evaluate
from incipit.prompts import Prompt
from incipit.tasks.example import Example
from incipit.tasks.metrics import compute
from incipit.tasks.task import Task


def nearest_class_mean(
    backbone: EncoderBackbone, prompt: Prompt, task: Task, shots: int, seed: int, split: str = "test"
) -> dict[str, float]:
    """c(x) = argmax_c cos(f(x), mean of f over `shots` training examples of class c): few-shot without training.

    Snell et al. 2017, section 2.3 (prototypes). `prompt` is the frame under which the encoder reads (no soft rows).
    """
    if not task.labels:
        raise DataError(f"task {task.name!r} has no classes: nearest class mean needs label words")
    few = Task(replace(task.spec, shots=shots, shots_seed=seed), task.base).train
    vectors = _vectors(backbone, prompt, few)  # [M, H]
    choice = torch.tensor([e.choice for e in few], device=vectors.device)
    there = sorted(set(choice.tolist()))  # a class that no example shows is never chosen
    means = torch.stack([vectors[choice == c].mean(dim=0) for c in there])  # [C, H]
    queries = task.examples(split)
    scores = _vectors(backbone, prompt, queries) @ nn.functional.normalize(means, dim=-1).T  # [B, C]
    words = [task.labels[there[i]] for i in scores.argmax(dim=1).tolist()]
    found = compute(task.metrics, words, queries)
    found.pop("legal_rate", None)
    return found


def demonstrated(
    backbone: Backbone,
    prompt: Prompt | None,
    task: Task,
    shots: int,
    seed: int,
    options: DecodeOptions,
    split: str = "test",
) -> dict[str, float]:
    """Few-shot prompt design: `shots` worked training examples before each input, no training (Brown et al. 2020)."""
    few = Task(replace(task.spec, demonstrations=shots, demonstrations_seed=seed), task.base)
    return evaluate(backbone, prompt, few.examples(split), task.metrics, options).scores


def _vectors(
    backbone: EncoderBackbone, prompt: Prompt, examples: Sequence[Example], batch: int = 64
) -> Tensor:
    """Normalised mean states [M, H] of the examples' inputs."""
    found = []
    with torch.no_grad():
        for start in range(0, len(examples), batch):
            encoded = [encode(backbone, e, room=prompt.length) for e in examples[start : start + batch]]
            ready = collate(encoded, pad_id=backbone.pad_id).to(backbone.device)
            states = backbone.pooled(ready, stacked([prompt], ready.rows), "mean")
            found.append(nn.functional.normalize(states.float(), dim=-1))
    return torch.cat(found)
