"""W6: seconds of training until SST-2 is read with a given accuracy on the dev split, on builtin:lm.

python -m benchmarks.w6_time_to_accuracy --data FOLDER [--accuracy 0.6] [--steps 1000]
FOLDER holds train.jsonl.gz and validation.jsonl.gz (lines with "sentence" and "label"). Ours is `fit` with the
defaults of the library and the one learning rate of the study; PEFT starts from sampled vocabulary and trains with
AdamW and linear decay at each of five rates, of which the fastest counts: a rate is left when it is slower than the
best so far, or takes 20 times our seconds. Both read the same rows in the same order,
and both are scored by the same code; scoring does not count. Loading does not count.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import machine, peer, sst2, workload
from benchmarks.workload import Plan
from incipit import files
from incipit.assemble import framed, make_prompt
from incipit.backbones import Backbone, load, tiny
from incipit.batch import Batch, Encoded, collate
from incipit.encode import encode
from incipit.evaluation import evaluate
from incipit.prompts import InputPrompt, Prompt
from incipit.recipe import Recipe
from incipit.run.parts import objective, passes, prompt_choice
from incipit.tasks.task import Task
from incipit.train import ExampleStream, FitSettings, OptimSettings, Trainee, fit

RATES = (0.03, 0.1, 0.01, 0.3, 0.003)
TARGET = {"ratio": 8.0}


LONGEST = 20.0  # times our own seconds, after which a rate of PEFT's is given up


class Over(Exception):
    """The accuracy is there, or it comes too late to count."""


class Watch:
    """A clock that stands still while scores are read, and runs out at `limit` s. curve: (step, seconds, accuracy)."""

    def __init__(
        self, accuracy: float, every: int, judge: Callable[[Prompt], float], limit: float = float("inf")
    ) -> None:
        self.accuracy, self.every, self.judge, self.limit = accuracy, every, judge, limit
        self.curve: list[tuple[int, float, float]] = []
        self.spent, self.since = 0.0, time.perf_counter()

    def read(self, prompt: Prompt) -> float:
        """Score; raises Over where the accuracy is there or the time is out."""
        self.spent += time.perf_counter() - self.since
        found = self.judge(prompt)
        self.curve.append(((len(self.curve) + 1) * self.every, self.spent, found))
        self.since = time.perf_counter()
        if found >= self.accuracy or self.spent >= self.limit:
            raise Over
        return found

    @property
    def seconds(self) -> float | None:
        """Until the accuracy was there; None if it never was."""
        return self.spent if self.curve and self.curve[-1][2] >= self.accuracy else None


def ours(recipe: Recipe, task: Task, backbone: Backbone, watch: Watch, steps: int) -> None:
    """`fit` as `incipit tune` calls it."""
    prompt = make_prompt(prompt_choice(recipe), backbone, task.labels, seed=0)
    assert prompt is not None

    def ready(example: Any) -> Encoded:
        return encode(backbone, example, room=prompt.length)

    def together(encoded: Any, rows: Any) -> Batch:
        return collate(encoded, rows, pad_id=backbone.pad_id)

    def judge() -> dict[str, float]:
        return {"accuracy": watch.read(prompt)}

    stream = ExampleStream(task.train, ready, seed=0)
    trainee = Trainee("sst2", prompt, stream, units=prompt.units())
    settings = FitSettings(
        steps=steps,
        batch=recipe.train.batch,
        eval_every=watch.every,
        show=False,
        optim=OptimSettings(lr=recipe.train.lr, schedule=recipe.train.schedule),
        **passes(backbone, [prompt], 0.0, "float32"),
    )
    with tempfile.TemporaryDirectory() as folder:
        watch.since = time.perf_counter()
        try:
            fit(
                [trainee],
                objective(backbone, [prompt]),
                settings,
                Path(folder) / "run",
                together,
                evaluate=lambda live: {k: judge() for k in live},
            )
        except Over:
            return


def peft(recipe: Recipe, task: Task, backbone: Backbone, watch: Watch, steps: int, rate: float) -> None:
    """PEFT's prompt tuning in the loop of its own examples, at one learning rate."""
    from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

    from incipit.backbones.builtin import locate

    place = (
        locate(recipe.backbone.name) if recipe.backbone.name.startswith("builtin:") else recipe.backbone.name
    )
    base = AutoModelForCausalLM.from_pretrained(place, dtype=backbone.dtype, attn_implementation="sdpa")
    torch.manual_seed(0)
    length = recipe.prompt.length
    choice = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=length,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
    )
    with peer.quiet_about_checkpointing():
        model: Any = get_peft_model(base, choice)
    model.train()
    weight = model.prompt_encoder["default"].embedding.weight
    optimiser = torch.optim.AdamW([weight], lr=rate)
    schedule = get_linear_schedule_with_warmup(optimiser, 0, steps)
    bos = tuple(backbone.layout_ids("{bos}"))

    def ready(example: Any) -> Encoded:  # PEFT puts the prompt first, so the opening token follows it
        found = encode(backbone, example, room=length + len(bos))
        return Encoded(bos + found.input_ids, found.target_ids)

    def baked() -> Prompt:
        inner = InputPrompt(backbone.geometry, length, rows=weight.detach().float().cpu()).to(backbone.device)
        prompt = framed(inner, backbone, "{soft}{bos}")
        assert prompt is not None
        return prompt

    stream = ExampleStream(task.train, ready, seed=0)
    watch.since = time.perf_counter()
    for step in range(1, steps + 1):
        given = peer.tensors(stream.next(recipe.train.batch), False, torch.device("cpu"))
        model(**given).loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % watch.every == 0:
            try:
                watch.read(baked())
            except Over:
                return


def measured(
    data: str, backbone_name: str, accuracy: float, steps: int, every: int, length: int
) -> dict[str, Any]:
    """The record, without provenance."""
    recipe = sst2.recipe(data, backbone_name, {"prompt": {"length": length}})
    backbone, task = load(backbone_name, dtype="float32", device="cpu"), recipe.load_task()
    dev = list(task.validation)

    def judge(prompt: nn.Module) -> float:
        assert isinstance(prompt, Prompt)
        return evaluate(backbone, prompt, dev, ["accuracy"]).scores["accuracy"]

    own = Watch(accuracy, every, judge)
    ours(recipe, task, backbone, own, steps)
    print(f"w6 ours: {_said(own)}", flush=True)
    watches: dict[float, Watch] = {}
    limit = LONGEST * own.seconds if own.seconds is not None else float("inf")
    for rate in RATES:  # only the fastest counts, so a rate stops where it can no longer be that
        watches[rate] = Watch(accuracy, every, judge, limit)
        peft(recipe, task, backbone, watches[rate], steps, rate)
        print(f"w6 PEFT at {rate:g}: {_said(watches[rate])}", flush=True)
        limit = min([limit, *(w.seconds for w in watches.values() if w.seconds is not None)])
    reached = [w.seconds for w in watches.values() if w.seconds is not None]
    best = min(reached) if reached else None
    return {
        "workload": "w6", "variant": "accuracy", "title": f"SST-2, builtin:lm, until dev accuracy {accuracy:g}",
        "settings": {"accuracy": accuracy, "steps": steps, "every": every, "length": length, "lr": recipe.train.lr,
                     "peer_rates": list(RATES), "longest": LONGEST, "data": task.data_hash, "dev_rows": len(dev),
                     "dtype": "float32"},
        "target": TARGET, "exact": False, "difference": {}, "allowed": {}, "unequal": [],
        "ratio": best / own.seconds if best is not None and own.seconds is not None else None,
        "seconds": {"ours": own.seconds, "peft": best, "samples": {"ours": [own.seconds], "peft": [best]}},
        "peer": {"init": "SAMPLE_VOCAB", "optimiser": "AdamW, linear decay", "attention": "sdpa"},
        "curves": {"ours": own.curve, "peft": {str(rate): w.curve for rate, w in watches.items()}},
    }  # fmt: skip


def _said(watch: Watch) -> str:
    best = max((c[2] for c in watch.curve), default=0.0)
    found = watch.seconds
    return f"{found:.1f} s" if found is not None else f"not reached in {watch.spent:.1f} s, best {best:.3f}"


def main() -> None:
    """The command line."""
    parser = workload.options(__doc__ or "")
    parser.add_argument(
        "--data", default="", help="folder with train.jsonl.gz and validation.jsonl.gz of SST-2"
    )
    parser.add_argument("--accuracy", type=float, default=0.6, help="dev accuracy to reach")
    parser.add_argument("--steps", type=int, default=1000, help="longest training")
    parser.add_argument("--every", type=int, default=25, help="steps between two scores")
    given = parser.parse_args()
    plan = workload.plan_of(given)
    if not given.data and not plan.toy:
        raise SystemExit("w6 needs SST-2: give its folder with --data")
    run(
        plan, machine.provenance(plan.device), given.out, given.data, given.accuracy, given.steps, given.every
    )


def run(
    plan: Plan,
    origin: dict[str, Any],
    out: str,
    data: str,
    accuracy: float = 0.6,
    steps: int = 1000,
    every: int = 25,
) -> None:
    """Measure and write the record; a toy is a random model and a handful of sentences."""
    if plan.toy:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tiny.save("llama", folder / "llama")
            found = measured(sst2.toy(folder), str(folder / "llama"), 0.5, 4, 2, 4)
    else:
        found = measured(data, "builtin:lm", accuracy, steps, every, 100)
    files.write_json(Path(out) / "w6-accuracy.json", found | {"toy": plan.toy} | origin)


if __name__ == "__main__":
    main()
