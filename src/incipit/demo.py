"""The main job in minutes: one frozen model learns several tasks, each in a prompt of a few kilobytes.

Per built-in task: majority class, zero-shot, few-shot, prompt tuning (all tasks of a backbone as one bundle), and for
one task model tuning; then, per model, one batch that mixes its prompts, checked against each prompt alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

from incipit import artifact, files
from incipit.assemble import PromptChoice, make_prompt
from incipit.backbones import Backbone, EncoderBackbone, GenerateOptions, fastest_dtype, load
from incipit.baselines import demonstrated, nearest_class_mean
from incipit.batch import collate
from incipit.decode import Prediction, predict, stacked
from incipit.encode import question
from incipit.errors import StorageError
from incipit.evaluation import DecodeOptions, evaluate
from incipit.prompts import Prompt
from incipit.recipe import Recipe
from incipit.run import Tuned, tune
from incipit.run.curves import MISSING
from incipit.tasks.example import Example
from incipit.tasks.task import Task, builtin, builtin_names

ENCODER, GENERATIVE = "builtin:minilm", "builtin:lm"
SHOTS = {
    "encoder": 16,
    "generative": 4,
}  # per class for the class means; demonstrations that fit the small context
TUNED_WHOLE = "questions"  # the task whose model tuning is shown for comparison
WHOLE = "model-tuning"  # the folder of that
STEPS = {"encoder": 120, "generative": 300, "model": 60}
OPTIONS = DecodeOptions(batch=64, generate=GenerateOptions(max_new_tokens=12))
Say = Callable[[str], None]


@dataclass
class Row:
    """One task's scores on its test split, in [0, 1], means over seeds; sizes in bytes."""

    task: str
    backbone: str
    metric: str
    majority: float | None = None
    zero_shot: float = 0.0
    few_shot: float = 0.0
    prompt_tuning: float = 0.0
    model_tuning: float | None = None
    prompt_bytes: int = 0
    model_bytes: int = 0
    seconds: float = 0.0


@dataclass
class Report:
    """What the demo found; `table()` is the JSON of `--json`."""

    backbone: str
    seeds: int
    rows: list[Row] = field(default_factory=list)
    mixed_batch_equal: bool = False
    mixed: list[tuple[str, str, str]] = field(default_factory=list)  # (task, input, answer)
    places: list[str] = field(default_factory=list)
    figure: str = ""
    seconds: float = 0.0

    def table(self) -> dict[str, Any]:
        """{"backbone", "seconds", "tasks": {NAME: {...}}, "mixed_batch_equal"}."""
        tasks = {
            r.task: {k: v for k, v in vars(r).items() if k != "task" and v is not None} for r in self.rows
        }
        return {
            "backbone": self.backbone,
            "seconds": round(self.seconds, 1),
            "seeds": self.seeds,
            "tasks": tasks,
            "mixed_batch_equal": self.mixed_batch_equal,
        }


def run(
    folder: files.PathLike, *, backbone: str = "", seeds: int = 1, say: Say = print, overwrite: bool = False
) -> Report:
    """Tune, compare, mix and save below `folder`. backbone: one model for all tasks; "" for the built-in ones."""
    started, place = time.monotonic(), Path(folder)
    report = Report(backbone or ENCODER, seeds)
    tasks = [builtin(name) for name in builtin_names()]
    plan: dict[str, list[Task]] = {}
    for task in tasks:
        plan.setdefault(backbone or (ENCODER if task.labels else GENERATIVE), []).append(task)
    taken = [f for f in (*(_folder(place, name) for name in plan), place / WHOLE) if files.exists(f)]
    if taken and not overwrite:
        raise StorageError(f"{str(taken[0])!r} exists already: pass --overwrite, or choose another --folder")
    mixed_equal = True
    for name, members in plan.items():
        model = load(name, dtype=fastest_dtype("auto"), device="auto")
        if isinstance(model, EncoderBackbone):
            for task in [t for t in members if not t.labels]:
                say(f"{task.name}: left out, because {name} is an encoder and writes no text")
            members = [t for t in members if t.labels]
        if not members:
            continue
        say(f"{name}: {model.parameters / 1e6:.1f}M frozen parameters, {len(members)} task(s)")
        rows = {t.name: _baselines(model, name, t, seeds) for t in members}
        tuned = _prompts(model, name, members, _folder(place, name), seeds, overwrite, say)
        for task in members:
            mine = [t for t in tuned if t.record["settings"]["name"] == task.name]
            rows[task.name].prompt_tuning = mean(next(iter(t.scores["test"].values())) for t in mine)
            rows[task.name].prompt_bytes = files.file_size(Path(mine[0].place) / artifact.TENSORS)
            rows[task.name].seconds = round(mean(t.record["seconds"] for t in mine), 1)
            report.places.append(mine[0].place)
        report.rows += rows.values()
        firsts = [next(t for t in tuned if t.record["settings"]["name"] == task.name) for task in members]
        mixed_equal &= _mix(model, members, firsts, report)
        if TUNED_WHOLE in rows:
            say(f"{TUNED_WHOLE}: model tuning of {name}, for comparison")
            rows[TUNED_WHOLE].model_tuning = _whole(name, TUNED_WHOLE, place, overwrite)
    report.mixed_batch_equal = mixed_equal
    report.seconds = time.monotonic() - started
    if report.rows and find_spec("matplotlib") is None:
        say(MISSING)
    elif report.rows:
        report.figure = str(place / "demo.png")
        draw(report, report.figure)
    return report


def _folder(place: Path, name: str) -> Path:
    """Where the prompts of one backbone go."""
    return place / name.replace(":", "-").replace("/", "-")


def recipe(name: str, backbone: Backbone, seeds: int, method: str = "prompt") -> Recipe:
    """The demo's recipe for one built-in task on one backbone."""
    encoder = isinstance(backbone, EncoderBackbone)
    steps = STEPS["model" if method == "model" else "encoder" if encoder else "generative"]
    whole = {
        "method": "model",
        "lr": 0.01,
        "precision": "bfloat16" if fastest_dtype("auto") == "bfloat16" else "float32",
    }
    rates = whole if method == "model" else {"lr": 0.2 if encoder else 0.1}
    return Recipe.of(
        {
            "name": name,
            "backbone": {
                "name": backbone.name,
                "dtype": "float32" if method == "model" else fastest_dtype("auto"),
            },
            "prompt": {"kind": "none"} if method == "model" else {"length": 20},
            "task": {"builtin": name},
            "train": {
                "steps": steps,
                "batch": 16,
                "schedule": "linear",
                "eval_every": steps // 4,
                "seeds": list(range(seeds)),
                **rates,
            },
            "decode": {"max_new_tokens": OPTIONS.generate.max_new_tokens},
        }
    )


def _baselines(model: Backbone, name: str, task: Task, seeds: int) -> Row:
    """Majority, zero-shot and few-shot on the test split."""
    bare = make_prompt(PromptChoice(kind="none"), model, task.labels)
    zero = evaluate(model, bare, task.test, task.metrics, OPTIONS).scores
    few = []
    for seed in range(seeds):
        if isinstance(model, EncoderBackbone):
            assert bare is not None
            scores = nearest_class_mean(model, bare, task, SHOTS["encoder"], seed)
        else:
            scores = demonstrated(model, bare, task, SHOTS["generative"], seed, OPTIONS)
        few.append(next(iter(scores.values())))
    size = model.parameters * 4
    return Row(
        task.name,
        name,
        task.metrics[0],
        majority=task.majority("test"),
        zero_shot=next(iter(zero.values())),
        few_shot=mean(few),
        model_bytes=size,
    )


def _prompts(
    model: Backbone, name: str, tasks: Sequence[Task], folder: Path, seeds: int, overwrite: bool, say: Say
) -> list[Tuned]:
    recipes = [recipe(t.name, model, seeds) for t in tasks]
    say(f"{name}: tuning {len(recipes) * seeds} prompt(s) of 20 rows at once, {recipes[0].train.steps} steps")
    return tune(recipes, folder, overwrite=overwrite, backbone=model)


def _whole(name: str, task: str, folder: Path, overwrite: bool) -> float:
    """Model tuning of a fresh copy of the backbone; its test score."""
    fresh = load(name, dtype="float32", device="auto")
    done = tune([recipe(task, fresh, 1, "model")], folder / WHOLE, overwrite=overwrite, backbone=fresh)
    return float(next(iter(done[0].scores["test"].values())))


def _mix(model: Backbone, tasks: Sequence[Task], tuned: Sequence[Tuned], report: Report) -> bool:
    """Answer one batch that mixes all tasks, and compare with each prompt alone."""
    prompts: list[Prompt] = [artifact.load(t.place).prompt(model) for t in tuned]
    examples = [(k, e) for k, task in enumerate(tasks) for e in task.test[:3]]
    examples = examples[::2] + examples[1::2]  # interleaved, so that neighbours differ
    together = predict(
        model, prompts, [e for _, e in examples], [k for k, _ in examples], options=OPTIONS.generate
    )
    equal = True
    for (k, example), answer in zip(examples, together, strict=True):
        alone = predict(model, [prompts[k]], [example], options=OPTIONS.generate)[0]
        equal &= _same(answer, alone) or _tied(model, prompts[k], example, answer.text, alone.text)
    seen: set[int] = set()
    for (k, example), answer in zip(examples, together, strict=True):
        if k not in seen:
            seen.add(k)
            report.mixed.append((tasks[k].name, example.input, answer.text))
    return equal


def _same(one: Prediction, other: Prediction, tolerance: float = 0.02) -> bool:
    """Equal answers; shares differ by no more than the dtype's rounding."""
    near = all(abs(one.probabilities[w] - other.probabilities[w]) <= tolerance for w in one.probabilities)
    return one.text == other.text and near


def _tied(
    model: Backbone, prompt: Prompt, example: Example, one: str, other: str, tolerance: float = 0.1
) -> bool:
    """Whether two written answers part at a token where both are as likely, up to the dtype's rounding."""
    if example.choices:
        return False
    asked = question(model, example, room=prompt.length)
    ids = [question(model, example, room=prompt.length, answer=t, end=True).target_ids for t in (one, other)]
    if not all(ids):  # an empty answer
        return False
    apart = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), 0)
    batch = collate([asked], pad_id=model.pad_id).to(model.device)
    (logs,) = model.choices(batch, stacked([prompt], batch.rows), [[row[: apart + 1] for row in ids]])
    return abs(logs[0] - logs[1]) <= tolerance


def draw(report: Report, path: files.PathLike) -> None:
    """One line per task with a dot for every way of doing it, as a PNG; needs matplotlib."""
    import io

    from matplotlib.figure import Figure

    ways = [("majority", "majority class", "#b0b0b0"), ("zero_shot", "zero-shot", "#7f9fbf"),
            ("few_shot", "few-shot", "#4477aa"), ("prompt_tuning", "prompt tuning", "#cc3311"),
            ("model_tuning", "model tuning", "#222222")]  # fmt: skip
    figure = Figure(figsize=(7.5, 0.7 * len(report.rows) + 1.6), layout="constrained")
    axes = figure.add_subplot()
    for y, row in enumerate(reversed(report.rows)):
        axes.axhline(y, color="#eeeeee", zorder=0)
        for key, label, colour in ways:
            value = getattr(row, key)
            if value is not None:
                size = 110 if key == "prompt_tuning" else 55
                axes.scatter(value, y, s=size, color=colour, label=label)
    axes.set_yticks(range(len(report.rows)), [f"{r.task} ({r.metric})" for r in reversed(report.rows)])
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel(f"score on the test split, mean of {report.seeds} seed(s)")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(), unique.keys(), loc="outside upper center", ncols=5, frameon=False, fontsize=8
    )
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=140)
    files.atomic_write(path, image.getvalue())
