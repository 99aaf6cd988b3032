"""Sweeps: one recipe at every combination of some keys' values.

over = axes(["lr=0.03,0.1", "prompt.length=5,20"])  # {"train.lr": [0.03, 0.1], "prompt.length": [5, 20]}
[c.recipe.name for c in combinations(recipe, over)]
# mood-lr0.03-length5, mood-lr0.03-length20, mood-lr0.1-length5, mood-lr0.1-length20
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from incipit.errors import RecipeError
from incipit.files import sha256_json
from incipit.recipe.problems import listed
from incipit.recipe.recipe import Recipe
from incipit.tasks.task import TaskSpec

LONGEST = 24  # characters of a value in a name


@dataclass(frozen=True)
class Combination:
    """One cell of a sweep. base: the name of the recipe it varies. values: key -> value, in the order of the sweep."""

    recipe: Recipe
    base: str
    values: Mapping[str, Any] = field(default_factory=dict)


def axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Texts "KEY=VALUE,VALUE" -> key of a recipe -> its values, each read as TOML or as a plain word.

    Raises one RecipeError that lists every problem: an unknown, ambiguous or repeated key, a value that does not parse.
    """
    found: dict[str, list[Any]] = {}
    problems = []
    for text in texts:
        name, equals, listing = text.partition("=")
        try:
            if not equals or not name.strip() or not listing.strip():
                raise RecipeError(f"is no sweep; got {text!r}; write a key and its values: lr=0.03,0.1")
            key = full_key(name.strip())
            if key in found:
                raise RecipeError(
                    f"{key} is swept already; got {text!r}; write all its values in one --sweep"
                )
            values = [_value(part) for part in _parts(listing)]
            told = [json.dumps(value, sort_keys=True) for value in values]
            if len(set(told)) < len(told):
                twice = max(told, key=told.count)
                raise RecipeError(f"a value is there twice; got {twice}; write each once")
            found[key] = values
        except RecipeError as error:
            problems.append(f"--sweep {text}: {error}")
    if problems:
        raise RecipeError(listed(problems, "the sweep"))
    return found


def full_key(name: str) -> str:
    """ "lr" -> "train.lr"; raises RecipeError for a key that is unknown, in two tables, or not for sweeping."""
    known = _known()
    if name in ("name", "seeds", "train.seeds"):
        move = (
            "each member is named by its values"
            if name == "name"
            else "give --seeds N for the seeds 0 to N-1"
        )
        raise RecipeError(f"{name!r} is no key of a sweep; {move}")
    table, dot, rest = name.partition(".")
    if dot and (name in known or (f"{table}.{rest.partition('.')[0]}" in known and table == "task")):
        return name  # the second: a key within a table of the task, as task.split.validation
    homes = [key for key in known if key.partition(".")[2] == name]
    if len(homes) == 1:
        return homes[0]
    if homes:
        raise RecipeError(f"{name!r} is a key of several tables; got {name!r}; write {' or '.join(homes)}")
    short = {key.partition(".")[2]: key for key in reversed(known)}
    close = difflib.get_close_matches(rest or name, short, n=1, cutoff=0.5)
    hint = f"did you mean {short[close[0]]!r}?" if close else "see the tables of docs/cli.md"
    raise RecipeError(f"unknown key {name!r}; {hint}")


def combinations(
    recipe: Recipe, over: Mapping[str, Sequence[Any]], seeds: Sequence[int] | None = None
) -> list[Combination]:
    """The product of all values, the last key changing fastest; each with its own name.

    seeds: of every combination, in place of the recipe's. Raises RecipeError where a combination is no recipe.
    """
    fixed: dict[str, Any] = {} if seeds is None else {"train.seeds": list(seeds)}
    found, said = [], {key: _said(short, over[key]) for key, short in short_names(over).items()}
    for values in itertools.product(*over.values()):
        changed = dict(zip(over, values, strict=True))
        name = "-".join([recipe.name, *(said[key][over[key].index(value)] for key, value in changed.items())])
        told = ", ".join(f"{key} = {json.dumps(value)}" for key, value in changed.items())
        source = f"{recipe.name} at {told}" if told else recipe.name
        found.append(
            Combination(recipe.varied(changed | fixed | {"name": name}, source), recipe.name, changed)
        )
    return found


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Key -> its last part, or the whole key where two have the same last part."""
    lasts = {key: key.rpartition(".")[2] for key in keys}
    counts = list(lasts.values())
    return {key: last if counts.count(last) == 1 else key for key, last in lasts.items()}


def _known() -> list[str]:
    """Every key of a recipe, as table.key."""
    fields = {n: f.annotation for n, f in Recipe.model_fields.items() if n not in ("name", "task")}
    found = [f"{table}.{key}" for table, kind in fields.items() for key in getattr(kind, "model_fields", {})]
    return [*found, "task.builtin", *(f"task.{f.name}" for f in dataclasses.fields(TaskSpec))]


def _said(short: str, values: Sequence[Any]) -> list[str]:
    """Each value as part of a name: lr0.03, start-label; of letters, digits, dots, dashes and underscores."""
    found = []
    for value in values:
        text = value if isinstance(value, str) else json.dumps(value)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text)
        found.append(
            short.replace(".", "-")
            + ("" if number else "-")
            + plain.strip("-" if not number else "")[:LONGEST]
        )
    if len(set(found)) == len(found):
        return found
    return [f"{name}-{sha256_json(value)[:6]}" for name, value in zip(found, values, strict=True)]


def _parts(text: str) -> list[str]:
    """Cut at the commas that stand in no quotes and no brackets."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        depth += (letter in "[{") - (letter in "]}") if not quote else 0
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _value(text: str) -> Any:
    try:
        table = tomllib.loads(f"x = {text}")
        if set(table) == {"x"} and isinstance(table["x"], (bool, int, float, str, list, dict)):
            return table["x"]
    except tomllib.TOMLDecodeError:
        pass
    if re.fullmatch(r"[A-Za-z_][^\"'\[\]{}]*", text):
        return text  # a word needs no quotes
    raise RecipeError(
        f'a value does not parse; got {text!r}; write TOML: a number, true, a word, "text", [1, 2]'
    )
