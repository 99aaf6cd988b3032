"""The grid: every cell of a study once, in order of backbone, resumable wherever it was killed.

A row of records.jsonl counts for a cell when settings (its key), data hash and backbone fingerprint are those of now.
What is done is not redone; what is half done goes on from its checkpoint; rows of other settings stay where they are
and are not read.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from incipit import files, record
from incipit.backbones import Backbone, load
from incipit.errors import DataError, Interrupted, RecipeError
from incipit.pretrain import PretrainSettings, pretrain
from incipit.recipe import settings_of
from incipit.study import cells
from incipit.study.plan import Cell, Study
from incipit.tasks.task import Task

RECORDS, MADE = "records.jsonl", "made.json"
Say = Callable[[str], None]


@dataclass
class Done:
    """What a run of the grid did: cells run now, cells that were done before, seconds."""

    ran: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run(
    study: Study,
    folder: files.PathLike,
    *,
    only: Sequence[str] = (),
    corpus: str = "",
    stand_in: str = "",
    say: Say = print,
    limit: int = 0,
) -> Done:
    """Run what is not done yet, and append rows to records.jsonl below `folder`.

    corpus: the folder of raw text that the study's own backbones are trained on. stand_in: one backbone in place of
    every one, to try a study out; its rows have its fingerprint, so they are never taken for the study's. limit: stop
    after this many cells; 0: all.
    """
    bench = _Bench(study, Path(folder), corpus, stand_in, say)
    todo = _once(study, only)
    bench.check(todo)
    shown = Progress(study, todo, say)
    done, started = Done(), time.monotonic()
    for cell in todo:
        lacking = bench.lacking(cell)
        if not lacking:
            shown.known(cell, bench.seconds(cell))
            done.known.append(cell.name)
            continue
        if limit and len(done.ran) >= limit:
            break
        shown.start(cell)
        try:
            rows = bench.run(cell, lacking)
        except Interrupted as error:
            raise Interrupted(
                f"interrupted in {cell.name}; its state and {len(done.ran) + len(done.known)} of {len(todo)} cells "
                f"are saved in {str(folder)!r}: the same line goes on"
            ) from error
        shown.finish(cell, rows)
        done.ran.append(cell.name)
    done.seconds = time.monotonic() - started
    return done


def _once(study: Study, only: Sequence[str]) -> list[Cell]:
    """The different cells, grouped by backbone so that each is loaded once."""
    different: dict[str, Cell] = {}
    for place in study.places(only):
        for before in (
            place.cell.match,
            place.cell.source,
        ):  # what it is to meet, and to start from, come first
            if before is not None:
                different.setdefault(before.key, before)
        different.setdefault(place.cell.key, place.cell)
    known = list(different.values())
    first = [c.source for c in known if c.source is not None and c.source.backbone != c.backbone]
    order = list(dict.fromkeys(cell.backbone for cell in (*first, *known)))
    return sorted(different.values(), key=lambda cell: order.index(cell.backbone))


class Progress:
    """A line for each cell: its place in the grid, what came out, and the time that is left."""

    def __init__(self, study: Study, todo: Sequence[Cell], say: Say) -> None:
        self.study, self.say, self.count = study, say, len(todo)
        self.costs = {cell.key: cell.cost(study.parameters(cell.backbone)) for cell in todo}
        self.place, self.spent, self.paid = 0, 0.0, 0.0
        self.left = sum(self.costs.values())
        self._since = time.monotonic()

    def known(self, cell: Cell, seconds: float) -> None:
        """A cell that was done before: it tells how long the others will take."""
        self.place += 1
        self.left -= self.costs[cell.key]
        self.spent, self.paid = self.spent + seconds, self.paid + self.costs[cell.key]
        self.say(f"[{self.place}/{self.count}] {cell.name}: done before")

    def start(self, cell: Cell) -> None:
        """A cell begins."""
        self.place += 1
        self._since = time.monotonic()
        self.say(f"[{self.place}/{self.count}] {cell.name} ...{self._remaining()}")

    def finish(self, cell: Cell, rows: Sequence[Mapping[str, Any]]) -> None:
        """A cell ended."""
        seconds = time.monotonic() - self._since
        self.left -= self.costs[cell.key]
        self.spent, self.paid = self.spent + seconds, self.paid + self.costs[cell.key]
        scores = [s for row in rows if (s := score(row)) is not None]
        told = " ".join(f"{100 * s:.1f}" for s in scores)
        self.say(f"[{self.place}/{self.count}] {cell.name}: {told} in {seconds:.0f} s{self._remaining()}")

    def _remaining(self) -> str:
        if not self.paid or self.left <= 0:
            return ""
        minutes = self.left * self.spent / self.paid / 60
        return f"; about {minutes / 60:.1f} h left" if minutes >= 90 else f"; about {minutes:.0f} min left"


def score(row: Mapping[str, Any], split: str = "test") -> float | None:
    """THE metric of a row on a split; of a task without a test split that of validation."""
    scores = row["scores"].get(split) or (row["scores"].get("validation") if split == "test" else None)
    return float(next(iter(scores.values()))) if scores else None


def _itself(task: Task) -> Task:
    return task


class _Bench:
    """What cells share: the records, the data hashes, and one backbone at a time."""

    def __init__(self, study: Study, folder: Path, corpus: str, stand_in: str, say: Say) -> None:
        self.study, self.folder, self.corpus, self.stand_in, self.say = study, folder, corpus, stand_in, say
        self.path = folder / RECORDS
        self.rows = record.read(self.path) if files.exists(self.path) else []
        self._hashes: dict[str, str] = {}
        self._loaded: tuple[str, Backbone] | None = None
        self._places: dict[str, str] = {}

    def check(self, todo: Sequence[Cell]) -> None:
        """Before hours of work: every data set can be read, and what a backbone is trained on is named.

        Raises DataError with all that cannot, and the experiments that need it.
        """
        problems: dict[str, dict[str, None]] = {}
        for cell in todo:
            try:
                self._data(cell)
            except DataError as error:
                problems.setdefault(str(error), {})[cell.name.split("/")[0]] = None
        if problems:
            told = [f"{what} (for {', '.join(names)})" for what, names in problems.items()]
            raise DataError(
                f"the data of this study cannot be read, so nothing was started: {len(told)} problem(s); give its "
                "folder with --data, or a piece of the study with --only:\n  " + "\n  ".join(told)
            )
        for label in dict.fromkeys(cell.backbone for cell in todo if not self.stand_in):
            if "pretrain" in self.study.table["backbones"][label] and not files.exists(
                self._place(label) / MADE
            ):
                self._settings(str(self.study.table["backbones"][label]["pretrain"]), "")

    def _mine(self, cell: Cell) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["settings"].get("cell") == cell.key]

    def seconds(self, cell: Cell) -> float:
        """What its rows took."""
        return sum(float(row["seconds"]) for row in self._mine(cell))

    def lacking(self, cell: Cell) -> list[int]:
        """Seeds without a row under present settings, data and backbone."""
        rows = self._mine(cell)
        data = self._data(cell)
        rows = [
            row
            for row in rows
            if row["data"] == data or (row["seed"] == -1 and row["data"].get("task") == data.get("task"))
        ]
        if rows:
            fingerprint = self.lend(cell).fingerprint
            rows = [row for row in rows if row["backbone"]["fingerprint"] == fingerprint]
        seeds = {row["seed"] for row in rows}
        wanted = [*cell.seeds, *([-1] if cell.do == "ensemble" else [])]
        missing = [seed for seed in wanted if seed not in seeds]
        return list(cell.seeds) if cell.do == "ensemble" and missing else missing

    def _data(self, cell: Cell) -> dict[str, str]:
        """Hashes of a cell's task and of what it is shifted to."""

        def of(table: Mapping[str, Any], task: Callable[[], Task]) -> str:
            key = files.sha256_json(table)
            if key not in self._hashes:
                self._hashes[key] = task().data_hash
            return self._hashes[key]

        if cell.recipe.mixture is not None:
            tasks = cell.recipe.load_mixed()
            found = {
                f"task:{name}": of(dataclasses.asdict(task.spec), partial(_itself, task))
                for name, task in tasks.items()
            }
        else:
            found = {"task": of(cell.recipe.table()["task"], cell.recipe.load_task)}
        for name, table in cell.shift.items():
            found[f"shift:{name}"] = of(dict(table), partial(Task.load, {"name": "shift", **table}))
        return found

    def lend(self, cell: Cell) -> Backbone:
        """The frozen backbone of a cell; the former one goes."""
        if self._loaded is None or self._loaded[0] != cell.backbone:
            self._loaded = None
            self._loaded = cell.backbone, self.fresh(cell)
        return self._loaded[1]

    def fresh(self, cell: Cell) -> Backbone:
        """A copy of its own, as model tuning needs it."""
        b = cell.recipe.backbone
        name = self.stand_in or self._made(cell.backbone)
        return load(
            name,
            dtype=b.dtype,
            device=b.device,
            revision=b.revision or None,
            trust_code=b.trust_code,
            sentinel=b.sentinel,
        )

    def run(self, cell: Cell, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Run a cell and put its rows on record; a killed one goes on from its checkpoint."""
        if cell.source is not None and (before := self.lacking(cell.source)):
            self.run(cell.source, before)  # where two backbones start from one another
        place = self._folder(cell) / ("seeds-" + "-".join(map(str, seeds)))
        match = None if cell.match is None else self._targets(cell.match, seeds)
        starts = None if cell.source is None else self._starts(cell, cell.source, seeds, place)
        found = cells.run(
            cell, seeds, place, lambda: self.lend(cell), lambda: self.fresh(cell), match, starts
        )
        rows = []
        for one in found:
            known = record.find(self.path, one)
            rows.append(known or record.append(self.path, one))
        cells.clear(cell, seeds, place)
        self.rows += rows
        return rows

    def _folder(self, cell: Cell) -> Path:
        """Where the runs of a cell are, under present settings, data and backbone."""
        identity = [cell.key, self._data(cell), self.lend(cell).fingerprint]
        return self.folder / "cells" / files.sha256_json(identity)[:16]

    def _starts(self, cell: Cell, source: Cell, seeds: Sequence[int], place: Path) -> dict[int, str]:
        """Seed -> artifact from which a cell starts: the source's own, or carried over from another backbone."""
        there = cells.prompts(self._folder(source))
        if missing := [seed for seed in seeds if seed not in there]:
            raise RecipeError(
                f"the prompts of {source.name}, from which {cell.name} starts, are not in {str(self.folder)!r} for the "
                f"seeds {missing}, only their scores: remove those rows of {RECORDS}, and they are trained again"
            )
        if source.backbone == cell.backbone:
            return {seed: there[seed] for seed in seeds}
        own = self.fresh(source)
        return {
            seed: cells.carried(there[seed], own, self.lend(cell), place / "start" / str(seed))
            for seed in seeds
        }

    def _targets(self, cell: Cell, seeds: Sequence[int]) -> dict[int, float]:
        """Seed -> score on validation of a cell that was run."""
        data, fingerprint = self._data(cell), self.lend(cell).fingerprint
        found = {
            row["seed"]: score(row, "validation")
            for row in self._mine(cell)
            if row["data"] == data and row["backbone"]["fingerprint"] == fingerprint
        }
        missing = [seed for seed in seeds if found.get(seed) is None]
        if missing:
            raise RecipeError(
                f"{cell.name} has no score on validation for the seeds {missing}, which another cell is to meet: "
                "give its task a validation split and both the same seeds"
            )
        return {seed: value for seed in seeds if (value := found[seed]) is not None}

    def _made(self, label: str) -> str:
        """Where a backbone is; one that the study trains itself is trained first."""
        table = self.study.table["backbones"][label]
        if "pretrain" not in table:
            return str(table.get("name", label))
        if label not in self._places:
            start = self._made(table["after"]) if "after" in table else ""
            place = self._place(label)
            if not files.exists(place / MADE):
                self.say(f"{label}: pre-training by {table['pretrain']}")
                settings = self._settings(str(table["pretrain"]), start)
                exported = pretrain(settings, place, resume=True, tokens=place.parent / "tokens")
                files.write_json(place / MADE, {"recipe": table["pretrain"], "export": str(exported.name)})
            self._places[label] = str(place / "export")
        return self._places[label]

    def _place(self, label: str) -> Path:
        """Where a backbone of the study's own is, or will be: one for all labels of the same recipe."""
        recipe = Path(self.study.table["backbones"][label]["pretrain"])
        return self.folder / "backbones" / f"{recipe.stem}-{files.sha256_json(self.study.origin(label))[:8]}"

    def _settings(self, recipe: str, start: str) -> PretrainSettings:
        path = self.study.folder / recipe
        table = files.read_toml(path)
        if not self.corpus:
            raise RecipeError(
                f"{path} trains a backbone on raw text: give the folder of its files ({', '.join(table['corpus'])}) "
                "with --corpus"
            )
        for key in ("corpus", "validation"):
            table[key] = [str(Path(self.corpus) / Path(entry).name) for entry in table[key]]
        way = "blocks" if "blocks" in table else "start"  # what it takes over of the one before
        return settings_of(PretrainSettings, table | ({way: start} if start else {}), (), str(path))
