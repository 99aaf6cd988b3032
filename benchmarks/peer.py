"""PEFT's side: its prompt tuning over the same model, rows and prompt, with what makes it fastest.

Right-padded batches (left-padded for `generate`), no gradient checkpointing, the faster of the attention
implementations "sdpa" and "eager" (timed on a few rows before), torch.no_grad and inference_mode for inference.
# B batch, K prompts, P length, T text, V vocabulary
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Outcome, synchronise
from benchmarks.models import make, soft_rows
from incipit.batch import IGNORE, Encoded, pad

ATTENTIONS = ("sdpa", "eager")


@contextmanager
def quiet_about_checkpointing() -> Iterator[None]:
    """PEFT 0.21.2 asks a question of transformers 5.23 that is deprecated there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class Peer:
    """A PeftModel with one adapter per length of settings["lengths"]."""

    def __init__(self, settings: Mapping[str, Any], *, inference: bool = False) -> None:
        from peft import PromptTuningConfig, TaskType, get_peft_model

        base, _ = make(settings)
        self.seq2seq = bool(base.config.is_encoder_decoder)
        self.device = torch.device(settings["device"])
        self.settings: dict[str, Any] = {"inference_mode": inference}
        task = TaskType.SEQ_2_SEQ_LM if self.seq2seq else TaskType.CAUSAL_LM
        self.model: Any = None
        for k, length in enumerate(settings["lengths"]):
            # one submodule: the prompt stands before the encoder alone, as in the paper
            choice = PromptTuningConfig(
                task_type=task,
                num_virtual_tokens=length,
                inference_mode=inference,
                num_transformer_submodules=1 if self.seq2seq else None,
            )
            with quiet_about_checkpointing():
                if self.model is None:
                    self.model = get_peft_model(base, choice, adapter_name="0")
                else:
                    self.model.add_adapter(str(k), choice)
            with torch.no_grad():
                self.weight(k).copy_(soft_rows(settings, length, k + 1))
        self.model.train(not inference)
        self._attend(settings.get("peer_attention", "sdpa"))

    def weight(self, k: int) -> Tensor:
        """The trained embedding [P, H] of adapter k."""
        weight: Tensor = self.model.prompt_encoder[str(k)].embedding.weight
        return weight

    def use(self, k: int) -> None:
        """Make adapter k the active one."""
        if self.model.active_adapter != str(k):
            self.model.set_adapter(str(k))

    def choose_attention(self, given: Mapping[str, Any], run: Callable[[], object]) -> None:
        """Take the faster implementation for `run` (a few rows), unless the settings name one already."""
        if "peer_attention" in given:
            run()
            return
        seconds = {name: self._timed(name, run) for name in ATTENTIONS}
        self._attend(min(seconds, key=seconds.__getitem__))

    def _attend(self, name: str) -> None:
        self.model.get_base_model().set_attn_implementation(name)
        self.settings["attention"] = name

    def _timed(self, name: str, run: Callable[[], object]) -> float:
        """The least of three runs, the first not counted."""
        self._attend(name)
        seconds = []
        for _ in range(3):
            synchronise(self.device)
            start = time.perf_counter()
            run()
            synchronise(self.device)
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])


class Training(Peer):
    """Forward and backward of each adapter's rows; several adapters one after another by `set_adapter`."""

    def __init__(self, settings: Mapping[str, Any], rows: Sequence[tuple[int, Encoded]]) -> None:
        super().__init__(settings)
        self.given, self.rows = settings, list(rows)

    def step(self) -> Outcome:
        """Forward and backward of all rows."""
        return self._step(self.rows)

    def warm(self) -> None:
        """Choose the attention implementation on a few rows."""
        few = sorted(self.rows, key=lambda row: -len(row[1].input_ids) - len(row[1].target_ids))[:2]
        self.choose_attention(self.given, lambda: self._step(few))

    def _step(self, rows: Sequence[tuple[int, Encoded]]) -> Outcome:
        used = sorted({k for k, _ in rows})
        parts = {k: tensors([e for j, e in rows if j == k], self.seq2seq, self.device) for k in used}
        counts = {k: int((parts[k]["labels"] != IGNORE).sum()) for k in used}
        total, loss = sum(counts.values()), 0.0
        for k in used:
            self.use(k)
            self.weight(k).grad = None
            share = counts[k] / total
            mean = self.model(**parts[k]).loss  # over the label tokens of adapter k
            (mean * share).backward()
            loss += float(mean.detach()) * share
        grads = [self.weight(k).grad for k in used]
        return Outcome(loss=loss, gradient=torch.cat([g for g in grads if g is not None]))


def tensors(encoded: Sequence[Encoded], seq2seq: bool, device: torch.device) -> dict[str, Tensor]:
    """Right-padded input_ids, attention_mask and labels, as a collator for PEFT makes them."""
    if seq2seq:
        ids, mask = pad([e.input_ids for e in encoded], 0)
        targets, there = pad([e.target_ids for e in encoded], 0)
        labels = targets.masked_fill(~there, IGNORE)
    else:
        ids, mask = pad([e.input_ids + e.target_ids for e in encoded], 0)
        labels, _ = pad([(IGNORE,) * len(e.input_ids) + e.target_ids for e in encoded], IGNORE)
    found = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    return {name: tensor.to(device) for name, tensor in found.items()}
