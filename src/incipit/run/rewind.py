"""What a pruned prompt starts from again, and what it is compared with."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from incipit.assemble import make_prompt
from incipit.prompts import Masked, Prompt, RowPrompt
from incipit.prompts.masked import rewrapped, rows_within
from incipit.pruning import random_like, reverse
from incipit.recipe import PruneTable, Recipe
from incipit.run.bundle import collating, fit_settings
from incipit.run.members import Data, make_member
from incipit.run.parts import objective, prompt_choice
from incipit.train import fit

PLAIN_SEEDS = 1000  # plain run n of a prompt of seed s has seed 1000 (s + 1) + n


@dataclass
class Source:
    """A trained prompt with the recipe and seed that trained it."""

    name: str
    prompt: Prompt  # baked
    recipe: Recipe
    seed: int
    data: Data
    started: dict[str, Tensor | None] = field(default_factory=dict)  # rewinding target -> rows

    @property
    def rows(self) -> RowPrompt:
        """Its trained rows."""
        return rows_within(self.prompt)

    def masked(self, mask: Tensor, removed: bool, rows: Tensor | None = None) -> Prompt:
        """The prompt behind a mask [P, k], from other rows [P, W] where they are given; numbers of its own."""

        def change(table: RowPrompt) -> RowPrompt:
            own = copy.deepcopy(table)
            if rows is not None:
                own.set_rows(rows)
            return Masked(own, mask, removed)

        return rewrapped(self.prompt, change).to(self.data.backbone.device)

    def again(self, recipe: Recipe, seed: int) -> Prompt:
        """A fresh prompt of a recipe, at its start."""
        prompt = make_prompt(prompt_choice(recipe), self.data.backbone, self.data.task(recipe).labels, seed)
        assert prompt is not None
        return prompt


def target(source: Source, settings: PruneTable, name: str) -> Tensor | None:
    """The rows [P, W] of a rewinding target; None: the trained ones, as they are.

    "trained": Ma et al. 2022, section 3. "initial": Frankle and Carbin 2019. "early": Frankle et al. 2020. "fresh": new
    random numbers, so that the mask is all that is kept.
    """
    if name not in source.started:
        source.started[name] = None if name == "trained" else _target(source, settings, name)
    return source.started[name]


def _target(source: Source, settings: PruneTable, name: str) -> Tensor:
    recipe = source.recipe
    if name == "early":
        made = _early(source, max(1, round(settings.early * recipe.train.steps)))
    else:
        fresh = name == "fresh"
        seed = plain_seed(source, settings.seed) if fresh else source.seed
        made = source.again(recipe.varied(_starting("uniform")) if fresh else recipe, seed)
    return rows_within(made.bake()).rows().detach().clone()


class _Reached(Exception):
    """The step that was asked for."""


def _early(source: Source, step: int) -> Prompt:
    """The prompt as the recipe's own training has it after `step`: the same rows, rates and order of examples."""
    backbone, member = source.data.backbone, make_member(source.recipe, source.seed, source.data)

    def reached(live: Sequence[int]) -> dict[int, dict[str, float]]:
        raise _Reached

    with tempfile.TemporaryDirectory() as scratch:
        settings = replace(fit_settings([member], backbone, show=False), eval_every=step)
        with contextlib.suppress(_Reached):
            fit(
                [member.trainee], objective(backbone, [member.prompt]), settings, scratch, collating(backbone),
                evaluate=reached,
            )  # fmt: skip
    assert member.prompt is not None
    return member.prompt


def chosen(source: Source, settings: PruneTable, mask: Tensor) -> dict[str, Prompt]:
    """Name -> prompt at its start: "pruned" first, then every control that is asked for and makes sense here."""
    starts = {
        name: target(source, settings, name) for name in {settings.rewind, *settings.controls} & TARGETS
    }
    removed = settings.removed
    found = {"pruned": source.masked(mask, removed, starts[settings.rewind])}
    for control in dict.fromkeys(settings.controls):
        if control == "restart":
            found["restart"] = source.masked(torch.ones_like(mask), False)
        elif control == "random":
            for draw in range(settings.draws):
                other = random_like(mask, plain_seed(source, settings.seed + draw))
                name = f"random-{draw}" if settings.draws > 1 else "random"
                found[name] = source.masked(other, removed, starts[settings.rewind])
        elif control == "reversed" and not bool(mask.all()):
            found["reversed"] = source.masked(reverse(mask), removed, starts[settings.rewind])
        elif control == "shorter":
            found["shorter"] = source.again(shorter(source, mask), source.seed)
        elif control == "form":
            name = "zeroed" if removed else "removed"
            found[name] = source.masked(mask, not removed, starts[settings.rewind])
        elif control in TARGETS and control != settings.rewind:
            found[f"from {control}"] = source.masked(mask, removed, starts[control])
    for n in range(settings.plain):
        found[f"plain-{n}"] = source.again(source.recipe, plain_seed(source, n))
    return found


TARGETS = {"trained", "initial", "early", "fresh"}


def plain_seed(source: Source, n: int) -> int:
    """The seed of plain run, random mask or fresh start n: another for every prompt, and of no run of its recipe."""
    return PLAIN_SEEDS * (source.seed + 1) + n


def shorter(source: Source, mask: Tensor) -> Recipe:
    """The recipe with as many rows as the numbers that are kept would fill; where these are fewer than the label words
    or the given rows, they start from the vocabulary."""
    recipe = source.recipe
    length = max(1, round(int(mask.sum()) / mask.shape[1]))
    few = recipe.prompt.start == "label" and length < len(source.data.task(recipe).labels)
    start = _starting("vocabulary") if few or recipe.prompt.start == "given" else {}
    return recipe.varied({"prompt.length": length, **start})


def _starting(start: str) -> dict[str, str]:
    return {"prompt.start": start, "prompt.text": "", "prompt.source": ""}
