"""W7: prompt tuning of builtin:t5 on one epoch of SST-2, the whole command from start to end, joint and isolated.

python -m benchmarks.w7_one_epoch --data FOLDER [--fraction 1.0] [--repeats 1] [--backbone FOLDER]
Ours is `incipit tune`: loading, encoding, training, one score on dev, one on test, the share of free answers on test
that are label words, artifact and record. PEFT's side is this file with --as-peer: the same loading, rows, steps,
scores by its own forward passes, free answers by its own `generate`, and `save_pretrained`. Both start as a process of
their own and in turn.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine, sst2, workload
from benchmarks.workload import Plan
from incipit import files
from incipit.backbones import GenerateOptions
from incipit.batch import Encoded

TARGETS = {"joint": {"ratio": 1.3}, "isolated": {"ratio": 3.0}}
BATCH = 32
ATTENTION = "eager"  # the faster of PEFT's two here, as in W2


def settings_of(way: str, steps: int, length: int) -> dict[str, dict[str, Any]]:
    """What the recipe of both sides says."""
    prompt: dict[str, Any] = {"length": length}
    if way == "isolated":
        prompt["attention"] = "isolated"
    return {"prompt": prompt, "train": {"steps": steps, "eval_every": steps}}


def ours(data: str, backbone: str, way: str, steps: int, length: int, folder: Path) -> float:
    """Seconds of `incipit tune`."""
    recipe = sst2.recipe(data, backbone, settings_of(way, steps, length))
    files.atomic_write(folder / "sst2.toml", recipe.toml())
    command = [sys.executable, "-c", "from incipit.cli import main; main()", "tune", str(folder / "sst2.toml"),
               "--folder", str(folder / "run"), "--overwrite", "--quiet"]  # fmt: skip
    return _seconds(command)


def theirs(data: str, backbone: str, steps: int, length: int, folder: Path) -> float:
    """Seconds of the same by PEFT."""
    command = [sys.executable, "-m", "benchmarks.w7_one_epoch", "--as-peer", str(folder / "peft"), "--data", data,
               "--backbone", backbone, "--steps", str(steps), "--length", str(length)]  # fmt: skip
    return _seconds(command)


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"w7: {' '.join(command[:6])} ... failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def peer_command(data: str, backbone: str, steps: int, length: int, folder: str) -> None:
    """PEFT's side: load, encode, train, score dev and test, save."""
    import torch
    from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
    from transformers import AutoModelForSeq2SeqLM, get_linear_schedule_with_warmup

    from benchmarks import peer

    recipe = sst2.recipe(data, backbone, {"prompt": {"length": length}, "train": {"steps": steps}})
    task, place = recipe.load_task(), located(backbone)
    base = AutoModelForSeq2SeqLM.from_pretrained(place, dtype=torch.float32, attn_implementation=ATTENTION)
    tokenizer, ready = encoding(place)
    torch.manual_seed(0)
    choice = PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=length, num_transformer_submodules=1,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
    )  # fmt: skip
    with peer.quiet_about_checkpointing():
        model = get_peft_model(base, choice)
    model.eval()  # no dropout, as on our side
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = get_linear_schedule_with_warmup(optimiser, 0, steps)
    for rows in batches(task, ready, steps):
        model(**peer.tensors(rows, True, torch.device("cpu"))).loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    scores: dict[str, float] = {}
    with torch.no_grad():
        for name, examples in (("validation", task.validation), ("test", task.test)):
            scores |= _peer_scores(model, tokenizer, ready, name, list(examples))
    model.save_pretrained(folder)
    files.write_json(Path(folder) / "scores.json", scores)


def encoding(place: str) -> tuple[Any, Callable[[Any], Encoded]]:
    """The tokenizer, and what makes a row of an example."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place)
    end = (tokenizer.eos_token_id,)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    return tokenizer, lambda example: Encoded(ids(example.input) + end, ids(example.target) + end)


def batches(task: Any, ready: Callable[[Any], Encoded], steps: int) -> Iterator[list[Encoded]]:
    """The rows of every step, the same on both sides."""
    from incipit.train import ExampleStream

    stream = ExampleStream(task.train, ready, seed=0)
    for _ in range(steps):
        yield stream.next(BATCH)


def encoder_slots(data: str, backbone: str, steps: int, length: int) -> dict[str, float]:
    """Positions that the encoder reads in a step, prompt and input: without padding, and padded as PEFT's side is."""
    recipe = sst2.recipe(data, backbone, {"prompt": {"length": length}, "train": {"steps": steps}})
    _, ready = encoding(located(backbone))
    packed = padded = 0
    for rows in batches(recipe.load_task(), ready, steps):
        lengths = [length + len(row.input_ids) for row in rows]
        packed, padded = packed + sum(lengths), padded + len(rows) * max(lengths)
    return {"packed": packed / steps, "padded": padded / steps}


def _peer_scores(
    model: Any, tokenizer: Any, ready: Callable[[Any], Encoded], name: str, examples: list[Any]
) -> dict[str, float]:
    """Accuracy by the first target token; on test also the share of free answers that are label words."""
    import torch

    from benchmarks import peer

    words = [tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in sst2.LABELS.values()]
    right = legal = 0
    ordered = sorted(examples, key=lambda e: len(e.input))
    for at in range(0, len(ordered), 64):
        part = ordered[at : at + 64]
        given = peer.tensors([ready(e) for e in part], True, torch.device("cpu"))
        logits = model(**given | {"labels": given["labels"][:, :1]}).logits[:, 0, words]
        right += sum(e.choices[i] == e.target for e, i in zip(part, logits.argmax(1).tolist(), strict=True))
        if name == "test":
            del given["labels"]
            written = model.generate(**given, max_new_tokens=GenerateOptions().max_new_tokens)
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            legal += sum(text.strip() in sst2.LABELS.values() for text in texts)
    count = max(1, len(examples))
    return {name: right / count} | ({"legal_rate": legal / count} if name == "test" else {})


def located(backbone: str) -> str:
    """The folder of a built-in backbone, or the name itself."""
    from incipit.backbones.builtin import locate

    return locate(backbone) if backbone.startswith("builtin:") else backbone


def run(
    plan: Plan, origin: dict[str, Any], out: str, data: str, backbone: str = "builtin:t5", fraction: float = 1.0,
    repeats: int = 1,
) -> None:  # fmt: skip
    """Measure both forms in turn with PEFT and write the records."""
    steps, length = max(1, math.ceil(fraction * sst2.ROWS / BATCH)), 100
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if plan.toy:
            from incipit.backbones import tiny

            tiny.save("t5", folder / "t5")
            data, backbone, steps, length, repeats = sst2.toy(folder), str(folder / "t5"), 2, 4, 1
        else:
            located(backbone)
        samples: dict[str, list[float]] = {"joint": [], "isolated": [], "peft": []}
        for _ in range(repeats):
            for way in ("joint", "isolated"):
                samples[way].append(ours(data, backbone, way, steps, length, folder))
            samples["peft"].append(theirs(data, backbone, steps, length, folder))
        slots = encoder_slots(data, backbone, steps, length)
        for way in ("joint", "isolated"):
            found = _record(way, samples, steps, fraction, length) | {"toy": plan.toy} | origin
            found["encoder_slots"] = slots
            files.write_json(Path(out) / f"w7-{way}.json", found)
            print(workload.said(found), flush=True)


def _record(
    way: str, samples: dict[str, list[float]], steps: int, fraction: float, length: int
) -> dict[str, Any]:
    own, peer = median(samples[way]), median(samples["peft"])
    part = "one epoch" if fraction == 1 else f"{fraction:g} of an epoch"
    return {
        "workload": "w7", "variant": way, "title": f"SST-2, builtin:t5, {part}, {way}",
        "settings": {"steps": steps, "fraction": fraction, "length": length, "batch": BATCH, "dtype": "float32"},
        "target": TARGETS[way], "exact": False, "ratio": peer / own, "difference": {}, "allowed": {}, "unequal": [],
        "seconds": {"ours": own, "peft": peer, "samples": {"ours": samples[way], "peft": samples["peft"]}},
        "peer": {"attention": ATTENTION, "optimiser": "AdamW"},
    }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = workload.options(__doc__ or "")
    parser.add_argument(
        "--data", default="", help="folder with train.jsonl.gz and validation.jsonl.gz of SST-2"
    )
    parser.add_argument("--backbone", default="builtin:t5", help="the encoder-decoder")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of an epoch")
    parser.add_argument("--as-peer", default="", help="run PEFT's side alone and leave it in this folder")
    parser.add_argument("--steps", type=int, default=0, help="with --as-peer")
    parser.add_argument("--length", type=int, default=100, help="with --as-peer")
    parser.set_defaults(repeats=1)
    given = parser.parse_args()
    if given.as_peer:
        peer_command(given.data, given.backbone, given.steps, given.length, given.as_peer)
        return
    plan = workload.plan_of(given)
    if not given.data and not plan.toy:
        raise SystemExit("w7 needs SST-2: give its folder with --data")
    origin = machine.provenance(plan.device)
    run(plan, origin, given.out, given.data, given.backbone, given.fraction, given.repeats)


if __name__ == "__main__":
    main()
