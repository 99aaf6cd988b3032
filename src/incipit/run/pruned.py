"""Pruning: a trained prompt -> scores -> masks tried on validation -> the best one trained again, beside its controls.

    found = prune("runs/mood/mood", "runs/mood-pruned")
    found.place  # an artifact with its mask; found.rows: every candidate and control with its scores

Ma et al. 2022 (XPrompt), section 3.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from incipit import artifact, files, record
from incipit.artifact import Artifact
from incipit.backbones import Backbone
from incipit.errors import ArtifactError, PromptError, RecipeError, StorageError, TrainingError
from incipit.evaluation import Trial, evaluate_all
from incipit.prompts import Masked, Prompt
from incipit.prompts.masked import check_pieces, rows_within
from incipit.pruning import Scores, fitting, score
from incipit.recipe import PruneTable, Recipe
from incipit.run.candidates import Candidates, Flags, PrunedRow, Ratios, clock, mask_within, size
from incipit.run.members import Data, Member
from incipit.run.parts import decode_options, drawn, load_backbone, text_form
from incipit.run.rewind import Source, chosen, plain_seed, shorter
from incipit.run.scoremap import draw
from incipit.train.checkpoint import FILE as CHECKPOINT

TABLE, FIGURE, RECORDS = "pruned.json", "scores.png", "record.jsonl"
STAGES = ("tokens", "pieces", "grid", "retrained")


@dataclass(frozen=True)
class Pruned:
    """What came out. mask [P, k]. rows, cost: see Candidates. figure: its path, "" without one, and `note` says why."""

    name: str
    place: str
    prompt: Prompt
    mask: Tensor
    scores: Scores
    rows: list[PrunedRow]
    cost: dict[str, dict[str, float]]
    record: dict[str, Any]
    figure: str
    note: str

    def table(self) -> list[dict[str, Any]]:
        """The rows, as JSON can hold them."""
        return [asdict(row) for row in self.rows]


def prune(
    source: Artifact | files.PathLike,
    folder: files.PathLike,
    settings: PruneTable | None = None,
    *,
    overrides: Sequence[str] = (),
    name: str = "",
    backbone: Backbone | None = None,
    resume: bool = False,
    overwrite: bool = False,
    show: bool = True,
) -> Pruned:
    """Score, search, train again and compare; write the artifact, its table, figure and record below `folder`.

    overrides: "train.steps=200" texts that change the recipe of the retraining. backbone: a loaded one. Raises
    ArtifactError for a prompt of another backbone or one that no recipe trained, RecipeError without a validation
    split, PromptError for a prompt that is pruned already or cannot be cut into pieces, TrainingError or StorageError
    where the folder holds a run or the artifact already.
    """
    settings = settings or PruneTable()
    found = source if isinstance(source, Artifact) else artifact.load(source)
    recipe, seed = _recipe(found, overrides)
    model = backbone or load_backbone(recipe)
    prompt = found.prompt(model)
    table = rows_within(prompt)
    if isinstance(table, Masked):
        raise PromptError(
            f"prompt {found.name!r} is pruned already: prune the one that it came from, with other ratios"
        )
    check_pieces(table, settings.pieces)
    flags = Flags(Path(folder), resume, overwrite, show)
    job = _Job(Source(found.name, prompt, recipe, seed, Data(model)), settings, flags, name)
    job.check()
    scores = job.importance()
    ratios = job.candidates.search(scores)
    return job.finish(scores, ratios)


def _recipe(source: Artifact, overrides: Sequence[str]) -> tuple[Recipe, int]:
    """The recipe and seed in the card, changed; its trust_code is not taken: it would run a stranger's code."""
    table = {k: v for k, v in source.card.get("recipe", {}).items() if k != "seed"}
    if isinstance(table.get("backbone"), Mapping):
        table["backbone"] = {k: v for k, v in table["backbone"].items() if k != "trust_code"}
    if not table:
        raise ArtifactError(
            f"the card of {source.place!r} names no recipe, so there is no data to score and train it on: prune a "
            "prompt that `incipit tune` wrote"
        )
    recipe = Recipe.of(table, overrides, source=f"the recipe in the card of {source.place}")
    return recipe, int(source.card["recipe"].get("seed", recipe.train.seeds[0]))


class _Job:
    """One prompt on its way: `check`, `importance`, the search of its candidates, `finish`."""

    def __init__(self, source: Source, settings: PruneTable, flags: Flags, name: str) -> None:
        self.source, self.settings, self.flags = source, settings, flags
        self.name = name or f"{source.name}-pruned"
        self.backbone, self.task = source.data.backbone, source.data.task(source.recipe)
        self.candidates = Candidates(source, settings, flags)
        self.started = time.monotonic()

    def check(self) -> None:
        """Before a long training: there is something to choose on, and a place to write to."""
        if not len(self.task.validation):
            raise RecipeError(
                f"ratios are chosen on validation, which the task {self.task.name!r} lacks: name task.validation, or "
                "set task.split.validation=0.1"
            )
        folder, flags = self.flags.folder, self.flags
        there = any(files.exists(folder / stage / CHECKPOINT) for stage in STAGES)
        if there and not flags.resume and not flags.overwrite:
            raise TrainingError(
                f"{str(folder)!r} holds a run already: pass --resume to go on with it, --overwrite to replace it, or "
                "choose another folder"
            )
        place = folder / self.name
        if files.exists(place) and not flags.overwrite and not (flags.resume and there):
            raise StorageError(f"{str(place)!r} exists already: choose another folder, or pass --overwrite")
        artifact.check_replaceable(place)

    def importance(self) -> Scores:
        """Scores on training examples, chosen by seed where there are more than asked for."""
        started, s = clock(), self.settings
        ready = self.source.data.ready(self.source.recipe, self.source.prompt.length)
        if self.task.spec.streaming:
            examples = list(islice(self.task.stream(s.seed, 0), s.examples))
        else:
            train = self.task.train
            count = min(s.examples, len(train))
            examples = [train[i] for i in random.Random(s.seed).sample(range(len(train)), count)]
        found = score(self.backbone, self.source.prompt, [ready(e) for e in examples], s.pieces)
        self.candidates.spent("scores", 0, len(examples), 0, started)
        return found

    def finish(self, scores: Scores, ratios: tuple[float, float]) -> Pruned:
        """The chosen mask and its controls, trained in full as one bundle; then each is scored once on test."""
        mask, source, candidates = fitting(scores, *ratios), self.source, self.candidates
        prompts = chosen(source, self.settings, mask)
        recipes = {"shorter": shorter(source, mask)} if "shorter" in prompts else {}
        seeds = {f"plain-{n}": plain_seed(source, n) for n in range(self.settings.plain)}
        members, outcomes = candidates.train(
            "retrained",
            {name: (recipes.get(name, source.recipe), seeds.get(name, source.seed), prompt)
             for name, prompt in prompts.items()},
        )  # fmt: skip
        tests = self._tested(members, mask, ratios)
        for member, outcome in zip(members, outcomes, strict=True):
            assert member.prompt is not None
            own: Ratios = ratios if mask_within(member.prompt) and member.name != "restart" else (None, None)
            stage = "retrained" if member.name == "pruned" else "control"
            candidates.note(stage, member, outcome, own, tests[member.name])
        self._choose_plain()
        return self._written(scores, mask, ratios, members[0], outcomes[0].curve())

    def _tested(
        self, members: Sequence[Member], mask: Tensor, ratios: tuple[float, float]
    ) -> dict[str, dict[str, float]]:
        """Test scores of the members; as rows, dev and test of what is not trained further: the prompt as it came, and
        masked by zeroing and by removal."""
        still = {
            "as it came": self.source.prompt,
            "masked only": self.source.masked(mask, False),
            "removed only": self.source.masked(mask, True),
        }
        recipe, test = self.source.recipe, self.task.test
        dev = drawn(self.task.validation, recipe.train.eval_limit)
        options, metrics = decode_options(recipe), self.task.metrics
        devs = [Trial(prompt, dev, metrics, options) for prompt in still.values()]
        trials = {m.name: m.test for m in members if m.test is not None}
        if len(test):
            trials |= {name: Trial(prompt, test, metrics, options) for name, prompt in still.items()}
        scored = evaluate_all(self.backbone, list(trials.values()), legality=True)
        found = {name: one.scores for name, one in zip(trials, scored, strict=True)}
        for (name, prompt), one in zip(still.items(), evaluate_all(self.backbone, devs), strict=True):
            own: Ratios = (None, None) if name == "as it came" else ratios
            scores = one.scores, found.get(name, {})
            self.candidates.rows.append(PrunedRow("untrained", name, *own, *size(prompt), 0, *scores))
        return {m.name: found.get(m.name, {}) for m in members}

    def _choose_plain(self) -> None:
        """Of the plain runs the one that validation would take, as a row of its own."""
        rows = self.candidates.rows
        plain = [row for row in rows if row.name.startswith("plain-")]
        if plain:
            best = max(plain, key=self.candidates.value)
            rows.append(replace(best, name=f"best of {len(plain)} plain", chosen=True))

    def _written(
        self,
        scores: Scores,
        mask: Tensor,
        ratios: tuple[float, float],
        member: Member,
        curve: Mapping[str, Any],
    ) -> Pruned:
        """The artifact, the record, the table and the figure."""
        rows = self.candidates.rows = [
            replace(
                row,
                chosen=row.chosen or (row.stage in STAGES and (row.token_ratio, row.piece_ratio) == ratios),
            )
            for row in self.candidates.rows
        ]
        (row,) = [one for one in rows if one.stage == "retrained"]
        splits = {"validation": row.dev} | ({"test": row.test} if row.test else {})
        table = self.source.recipe.table() | {"seed": self.source.seed}
        numbers = self.source.rows.length * self.source.rows.width
        how = {
            "from": self.source.name,
            "token_ratio": ratios[0],
            "piece_ratio": ratios[1],
            "tokens": row.tokens,
            "kept": row.kept,
            "numbers": numbers,
            "settings": self.settings.model_dump(mode="json"),
        }
        folder, prompt, cost = self.flags.folder, member.prompt, self.candidates.cost
        data = {"task": self.task.data_hash}
        place, main = str(folder / self.name), Accelerator().is_main_process
        assert prompt is not None
        if main:
            artifact.save(
                place, prompt=prompt, backbone=self.backbone, name=self.name, task=text_form(self.task), recipe=table,
                scores=splits, data=data, pruned=how, curve=curve, overwrite=True,
            )  # fmt: skip
        backbone = {
            "name": self.backbone.name,
            "fingerprint": self.backbone.fingerprint,
            "parameters": self.backbone.parameters,
        }
        seconds = round(time.monotonic() - self.started, 2)
        measured = {n: getattr(scores, n).tolist() for n in ("tokens", "pieces", "signed")}
        extra = {"pruned": how, "rows": [asdict(one) for one in rows], "cost": cost, "scores": measured}
        extra["mask"] = mask.int().tolist()
        new = record.Record(
            self.name, self.source.seed, splits, table, data, backbone, seconds, row.kept, extra
        )
        line = record.append(folder / RECORDS, new) if main else record.row(new)
        figure = note = ""
        if main:
            files.write_json(folder / TABLE, {"rows": extra["rows"], "cost": cost})
            title = (
                f"{self.name}: {row.tokens} of {len(mask)} tokens, {row.kept:,} of {numbers:,} numbers kept"
            )
            figure, note = draw(scores, mask, title, folder / FIGURE)
        return Pruned(self.name, place, prompt, mask, scores, rows, cost, line, figure, note)
