"""The small scale of this study: every method on the same data, shots and backbone; what is on record stays.

cd DATA && python PATH/studies/sesom2023/run.py --folder RUNS [--backbone builtin:lm] [--target cr] [--shots 16]

A cell is a target, a number of shots a class and a draw of them. Its methods: a prompt tuned on the shots, the sources
as they are ("raw") and tuned further on the shots ("adapted"), mixed in every way, a shared prompt that was distilled
from them, and ATTEMPT.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from incipit import artifact, ensemble, files, record, run, transfer
from incipit.artifact import Artifact
from incipit.assemble import make_prompt
from incipit.backbones import Backbone
from incipit.ensemble import Answers, Cached, Ensemble, GateSettings
from incipit.prompts import MultitaskPrompt, Prompt
from incipit.prompts.masked import rewrapped
from incipit.recipe import Recipe
from incipit.run.learned import adapt, folds_of, read_shots
from incipit.tasks.example import Example
from incipit.tasks.metrics import compute
from incipit.train import FitSettings, OptimSettings
from incipit.transfer.multitask import shared_within

HERE = Path(__file__).parent / "small"
SOURCES, TARGETS = ("qqp", "snli", "sst2", "subj"), ("mpqa", "cr", "trec", "emotion")
SHOTS, DRAWS, TEST, FOLDED, BATCH = (8, 16, 32), range(5), 120, 16, 64
# what differs from small/*.toml, of sources and of targets: a small model that writes must be taught for longer
BACKBONES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "builtin:minilm": ({}, {}),
    "builtin:lm": ({"train.steps": 600, "train.lr": 0.3}, {"train.steps": 60}),
}
GATES = (GateSettings("sesom"), GateSettings("fixed"))
Found = tuple[str, float, dict[str, Any]]  # method, accuracy, more


@dataclass(frozen=True)
class Bench:
    """What all cells share: the backbone, the folder, the source prompts, what the backbone changes of a target."""

    backbone: Backbone
    folder: Path
    changes: dict[str, Any]
    sources: list[Artifact]
    shared: MultitaskPrompt

    @classmethod
    def made(cls, folder: Path, name: str) -> "Bench":
        """Tunes the sources that are not there yet, and distils them into a shared prompt. name: of the backbone."""
        first, later = ({"backbone.name": name, **changes} for changes in BACKBONES[name])
        recipes = [Recipe.of(files.read_toml(HERE / f"source-{s}.toml")).varied(first) for s in SOURCES]
        backbone = run.load_backbone(recipes[0])
        places = [folder / r.name / r.name for r in recipes]
        for recipe, place in zip(recipes, places, strict=True):
            if not files.exists(place / artifact.CARD):
                run.tune([recipe], place.parent, resume=True, show=False, backbone=backbone)
        sources = [artifact.load(place) for place in places]
        return cls(backbone, folder, later, sources, distilled(sources, recipes, backbone, folder / "shared"))


def distilled(
    sources: list[Artifact], recipes: list[Recipe], backbone: Backbone, folder: Path
) -> MultitaskPrompt:
    """A start for one more task, of a shared prompt with factors for each source; resumable."""
    teachers = [source.prompt(backbone) for source in sources]
    rows = torch.stack([transfer.soft_rows(teacher) for teacher in teachers]).mean(dim=0)
    first = MultitaskPrompt(backbone.geometry, "low_rank", len(rows), rows=rows)
    inner = [first, *(first.sibling() for _ in teachers[1:])]
    students = [rewrapped(t, lambda _, own=own: own) for t, own in zip(teachers, inner, strict=True)]
    tasks = [
        transfer.Shared(s.name, p, r.load_task().train)
        for s, p, r in zip(sources, students, recipes, strict=True)
    ]
    t = recipes[0].train
    settings = FitSettings(steps=t.steps, batch=t.batch, optim=OptimSettings(t.optimiser, t.lr), show=False)
    hidden = backbone.family != "causal"  # whose states are not compared
    transfer.fit_shared(backbone, tasks, settings, folder, resume=True, teachers=teachers, hidden=hidden)
    return shared_within(transfer.next_start(students))


class Target:
    """One task: its test examples, the same for all cells, and what the raw sources say to them."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.name = bench, name
        self.recipe = Recipe.of(files.read_toml(HERE / f"target-{name}.toml")).varied(bench.changes)
        whole = self.recipe.varied({"task.shots": 0, "task.limit": TEST}).load_task()
        self.test, self.words, self.metric = list(whole.test), whole.labels, whole.metrics[0]
        self.raw = ensemble.prompts_for(bench.sources, bench.backbone, self.words)

    def ask(self, prompts: Sequence[Prompt], examples: Sequence[Example]) -> Answers:
        """Label scores of every prompt."""
        return ensemble.ask(self.bench.backbone, prompts, examples, mode="rank", batch=BATCH)

    @cached_property
    def said(self) -> Answers:
        """Of the raw sources, to the test examples."""
        return self.ask(self.raw, self.test)

    @cached_property
    def averaged(self) -> float:
        """Of the mean of the raw sources' rows."""
        return self.score([p.text for p in self.ask([ensemble.averaged(self.raw)], self.test).predictions[0]])

    def score(self, texts: Sequence[str], examples: Sequence[Example] | None = None) -> float:
        """THE metric."""
        return compute([self.metric], texts, examples or self.test)[self.metric]

    def alone(self, answers: Answers, examples: Sequence[Example] | None = None) -> list[float]:
        """THE metric of every prompt."""
        return [self.score([p.text for p in own], examples) for own in answers.predictions]


class Cell:
    """One draw of shots."""

    def __init__(self, target: Target, shots: int, draw: int) -> None:
        self.target, self.shots, self.draw = target, shots, draw
        self.recipe = target.recipe.varied(
            {"task.shots": shots, "task.shots_seed": draw, "train.seeds": [draw]}
        )
        task = self.recipe.load_task()
        self.train, self.data = list(task.train), task.data_hash

    @property
    def key(self) -> str:
        """Its name on record, without the draw."""
        return f"{self.target.name}/{self.shots}"

    def results(self) -> Iterator[Found]:
        """Every method's row."""
        target, backbone = self.target, self.target.bench.backbone
        fresh = make_prompt(run.prompt_choice(self.recipe), backbone, target.words, self.draw)
        assert fresh is not None
        everything = list(range(len(self.train)))
        start = rewrapped(fresh, lambda _: copy.deepcopy(target.bench.shared))
        *adapted, own, shared = adapt(
            [*target.raw, fresh, start], backbone, self.recipe, self.train, [everything]
        )[0]
        said = target.ask([*adapted, own, shared], target.test)
        mine = Answers(said.predictions[:-2], said.scores and said.scores[:-2])
        *alone, plain, multitask = target.alone(said)
        yield "prompt", plain, {}
        yield "multitask", multitask, {}
        near = transfer.similarities([transfer.soft_rows(p) for p in (own, *target.raw)])[0, 1:]
        yield "spot", alone[int(near.argmax())], {"similarity": near.tolist(), "each": alone}
        yield from self._mixed("raw", target.raw, target.said, target.averaged)
        average = target.alone(target.ask([ensemble.averaged(adapted)], target.test))[0]
        yield from self._mixed("adapted", adapted, mine, average)
        if self.shots == FOLDED:
            gates = self._gates(self._crossed(), mine)
            yield from ((f"adapted-{kind}-folds", score, more) for kind, score, more in gates)
        yield "attempt", self._attempt(int(near.argmax())), {"start": SOURCES[int(near.argmax())]}

    def _mixed(self, way: str, prompts: Sequence[Prompt], said: Answers, average: float) -> Iterator[Found]:
        """All that can be made of these sources; weights and choices are of the shots."""
        target, backbone = self.target, self.target.bench.backbone
        shots = target.ask(prompts, self.train)
        weights, alone = target.alone(shots, self.train), target.alone(said)
        best = max(range(len(weights)), key=weights.__getitem__)
        yield f"{way}-mean", sum(alone) / len(alone), {}
        yield f"{way}-best", alone[best], {"chosen": SOURCES[best]}
        yield f"{way}-average", average, {}
        for method in ("vote", "logits", "weighted"):
            own = tuple(weights) if method == "weighted" else ()
            found = Ensemble(tuple(prompts), method, own).combine(backbone, said, target.test)
            yield f"{way}-{method}", target.score([p.text for p in found]), {}
        right = ensemble.oracle(said, target.test)
        yield f"{way}-oracle", target.score([p.text for p in right]), {}
        read = ensemble.from_answers(backbone, shots, self.train, GATES[0])
        yield from ((f"{way}-{kind}", score, more) for kind, score, more in self._gates(read, said))

    def _gates(self, read: Cached, said: Answers) -> Iterator[Found]:
        """The two gates, learned on what was read of the shots; with their controls and mean weights."""
        e, backbone = self.recipe.ensemble, self.target.bench.backbone
        assert e is not None
        made = ensemble.fit_gates(GATES, read, steps=e.steps, lr=e.lr, weight_decay=e.weight_decay)
        test = ensemble.from_answers(backbone, said, self.target.test, GATES[0])
        for gate, _ in made:
            told = ensemble.controls(gate, test, self.draw)
            weights = gate(test.inputs, test.scores).mean(dim=0).tolist()
            more = {
                "controls": told,
                "weights": weights,
                "parameters": sum(p.numel() for p in gate.parameters()),
            }
            yield gate.settings.kind, told["sesom"], more

    def _crossed(self) -> Cached:
        """Of each shot, what copies say that were tuned without its fold."""
        target, e = self.target, self.recipe.ensemble
        assert e is not None
        parts = folds_of(len(self.train), e.folds, self.draw)
        rest = [[i for i in range(len(self.train)) if i not in part] for part in parts]
        copies = adapt(target.raw, target.bench.backbone, self.recipe, self.train, rest)
        whole: Cached | None = None
        for own, part in zip(copies, parts, strict=True):
            piece = read_shots(target.bench.backbone, own, [self.train[i] for i in part], GATES[0], BATCH)
            whole = piece if whole is None else whole + piece
        assert whole is not None
        return whole

    def _attempt(self, start: int) -> float:
        """P_t starts as the nearest source, as SPoT does."""
        target, t = self.target, self.recipe.train
        made = transfer.Attempt.of(target.raw[start], target.raw, seed=self.draw).to(
            target.bench.backbone.device
        )
        settings = FitSettings(
            steps=t.steps, batch=t.batch, optim=OptimSettings(t.optimiser, t.lr), show=False
        )
        with tempfile.TemporaryDirectory() as scratch:
            transfer.fit_attempt(
                target.bench.backbone, made, self.train, settings, scratch, gate_lr=0.01, seed=self.draw
            )
        return target.score([p.text for p in made.predict(target.bench.backbone, target.test)])


def run_cell(cell: Cell, path: Path) -> None:
    """Its record, at the end: a killed cell is done again."""
    started, bench, test = time.monotonic(), cell.target.bench, cell.target.metric
    found = list(cell.results())
    seconds = round(time.monotonic() - started, 2)
    kept = {
        "name": bench.backbone.name,
        "fingerprint": bench.backbone.fingerprint,
        "parameters": bench.backbone.parameters,
    }
    settings = {
        "cell": cell.key, "shots": cell.shots, "examples": len(cell.train), "test": TEST, "sources": list(SOURCES),
        "train": cell.recipe.table()["train"], "prompt": cell.recipe.table()["prompt"],
    }  # fmt: skip
    methods = {method: {"score": score, "metric": test, **more} for method, score, more in found}
    record.append(path, record.Record(
        f"sesom-{cell.target.name}-{cell.shots}", cell.draw, {}, settings, {"task": cell.data}, kept, seconds,
        extra={"methods": methods},
    ))  # fmt: skip
    shown = ", ".join(f"{method} {100 * score:.0f}" for method, score, _ in found)
    print(f"{cell.key} draw {cell.draw}: {shown}; {seconds} s", flush=True)


def main() -> None:
    """Draw by draw over the targets and shots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where sources and records go")
    parser.add_argument(
        "--backbone", choices=BACKBONES, default="builtin:minilm", help="default: builtin:minilm"
    )
    parser.add_argument("--target", choices=TARGETS, action="append", help="these alone")
    parser.add_argument("--shots", type=int, choices=SHOTS, action="append", help="these alone")
    parser.add_argument("--draw", type=int, action="append", help="these alone")
    given = parser.parse_args()
    folder = given.folder / given.backbone.partition(":")[2]
    path = folder / "record.jsonl"
    known = {(r["settings"]["cell"], r["seed"]) for r in record.read(path)} if files.exists(path) else set()
    bench = Bench.made(folder, given.backbone)
    for draw in given.draw or DRAWS:
        for name in given.target or TARGETS:
            target = Target(bench, name)
            for shots in given.shots or SHOTS:
                if (f"{name}/{shots}", draw) in known:
                    print(f"{name}/{shots} draw {draw}: on record")
                    continue
                run_cell(Cell(target, shots, draw), path)


if __name__ == "__main__":
    main()
