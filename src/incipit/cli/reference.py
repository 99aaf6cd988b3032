"""docs/cli.md, written from the verbs and the tables of a recipe: python -m incipit.cli.reference"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from incipit import files
from incipit.cli import VERBS, app
from incipit.pretrain import PretrainSettings
from incipit.recipe import (
    BackboneTable,
    DecodeTable,
    EnsembleTable,
    MixtureTable,
    PromptTable,
    PruneTable,
    Recipe,
    TrainTable,
    TransferTable,
)
from incipit.tasks.spec import TaskSpec
from incipit.train import FitSettings, OptimSettings

HEAD = """# Command line and recipes

<!-- Written by `python -m incipit.cli.reference`; change the code, not this page. -->

Exit codes: 0 done, 1 an error with its reason on stderr, 2 wrong usage, 130 Ctrl-C. Where the output is no
terminal, tables are tab-separated lines. `incipit VERB --help` says what stands here, `incipit --version` the version.
"""
RECIPE = """## Recipe

A TOML file. Everything has a default except the task; `--set KEY=VALUE` changes any key. All problems of a
recipe are listed at once.

```toml
{example}```
"""
EXAMPLE: dict[str, Any] = {
    "name": "mood",
    "backbone": {"name": "builtin:minilm"},
    "prompt": {"length": 8},
    "task": {"builtin": "reviews"},
    "train": {"steps": 200, "seeds": [0, 1, 2]},
}
TASK = """### [task]

Either `builtin = "NAME"`, or `form = "NAME"` with `data` ([published data sets](data.md#published-data-sets)), and the
keys that differ from that task; or these keys. Relative paths start at the folder of the recipe.
"""
PRUNE = """## Pruning: [prune]

Keys of `incipit prune`, set there by `--set prune.KEY=VALUE` or in the [prune] table of a file that `--settings` names;
no part of a recipe.
"""
PRETRAIN = """## Pre-training

Keys of a recipe of `incipit pretrain` ([how](pretraining.md)); `--set` changes any. Those without a default are needed.
"""
PRETRAIN_TABLES = {"fit": FitSettings, "fit.optim": OptimSettings}
UNSAID = {  # fields of a TaskSpec that share the text of another
    "name": "Name of the task; without it the recipe's.",
    "validation": "As `train`.",
    "test": "As `train`.",
    "demonstrations_seed": "Seed of the choice by `demonstrations`.",
}


def text() -> str:
    """The whole page."""
    assert app.registered_commands, "verbs register when incipit.cli is imported"
    parts = [HEAD, *(_verb(name, verb) for name, verb in VERBS.items())]
    parts.append(RECIPE.format(example=files.dump_toml(EXAMPLE)))
    parts.append(_rows({"name": ("text", Recipe.model_fields["name"].default)}, _docs(Recipe)))
    for name, table in _tables().items():
        parts += [f"### [{name}]\n", _fields(table)]
    keys = {f.name: (_plain(str(f.type)), _default(f)) for f in dataclasses.fields(TaskSpec)}
    parts += [TASK, _rows(keys, UNSAID | _docs(TaskSpec)), PRUNE, _fields(PruneTable)]
    parts += [PRETRAIN, _settings(PretrainSettings)]
    return "\n".join([*parts, *(f"### [{n}]\n\n{_settings(t)}" for n, t in PRETRAIN_TABLES.items())])


def _tables() -> dict[str, type[Any]]:
    tables = {"backbone": BackboneTable, "prompt": PromptTable, "train": TrainTable, "decode": DecodeTable}
    return {**tables, "mixture": MixtureTable, "ensemble": EnsembleTable, "transfer": TransferTable}


def _fields(table: type[Any]) -> str:
    """A row for each key of a table."""
    hints = typing.get_type_hints(table, include_extras=True)
    shown = {key: (_kind(hints[key]), field.default) for key, field in table.model_fields.items()}
    return _rows(shown, _docs(table))


def _settings(cls: type[Any]) -> str:
    """A row for each field of a dataclass that has a text under it; the others are set by the code."""
    hints, docs = typing.get_type_hints(cls), _docs(cls)
    said = [f for f in dataclasses.fields(cls) if f.name in docs]
    return _rows({f.name: (_kind(hints[f.name]), _default(f)) for f in said}, docs)


def _verb(name: str, verb: Callable[..., None]) -> str:
    """One verb: its text, then a row for each argument and option."""
    hints = typing.get_type_hints(verb, include_extras=True)
    usage, rows = [f"incipit {name}"], []
    for key, parameter in inspect.signature(verb).parameters.items():
        kind, info = typing.get_args(hints[key])[:2]
        many = typing.get_origin(kind) is list
        if isinstance(info, typer.models.ArgumentInfo):
            shown = f"{info.metavar}{'...' if many else ''}"
            usage.append(shown)
        else:
            named = [d for d in (info.default, *(info.param_decls or ())) if str(d).startswith("--")]
            shown = (
                str(named[0]) if named else f"--{key.replace('_', '-')}"
            )  # inside Annotated the first name stands as default
            shown += "" if kind is bool else f" {info.metavar or '|'.join(_choices(kind))}"
            usage += [shown] if parameter.default is parameter.empty else []
        rows.append(f"| `{_cell(shown)}` | {_cell(str(info.help))}{_given(info, parameter.default)} |")
    usage += ["[OPTIONS]"]
    about = inspect.cleandoc(verb.__doc__ or "")
    table = ["| argument | |", "|---|---|", *rows]
    return "\n".join([f"## incipit {name}\n", about, "", "```", " ".join(usage), "```", "", *table, ""])


def _choices(kind: Any) -> list[str]:
    return [str(m.value) for m in kind] if isinstance(kind, type) and issubclass(kind, Enum) else ["VALUE"]


def _given(info: Any, default: Any) -> str:
    """The default, where there is one to tell."""
    if (
        default is inspect.Parameter.empty
        or default is False
        or not info.show_default
        or default in ("", None)
    ):
        return ""
    return f" Default: `{default.value if isinstance(default, Enum) else default}`."


def _rows(keys: Mapping[str, tuple[str, Any]], docs: Mapping[str, str]) -> str:
    """A table of keys with what they take, their default, and the text under the field."""
    rows = []
    for key, (kind, default) in keys.items():
        value = "" if default is dataclasses.MISSING else f"`{_cell(json.dumps(default, default=list))}`"
        rows.append(
            f"| `{key}` | {_cell(kind)} | {'' if default is None else value} | {_cell(docs.get(key, ''))} |"
        )
    return "\n".join(["| key | takes | default | |", "|---|---|---|---|", *rows, ""])


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _docs(table: type[Any]) -> dict[str, str]:
    """Field -> the text under it."""
    (body,) = ast.parse(inspect.getsource(table)).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    key = ""
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            key = node.target.id
        elif key and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found.setdefault(key, " ".join(str(node.value.value).split()))
    return found


def _kind(hint: Any) -> str:
    """What a key takes, in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _kind(inner[0])
    if origin is typing.Literal:
        return " ".join(f'`"{word}"`' for word in inner if word) + (" or empty" if "" in inner else "")
    if origin is tuple:
        return f"list: {_kind(inner[0])}"
    if origin is Sequence:
        return "list"
    if origin in (types.UnionType, typing.Union):
        return _kind(inner[0])
    return {int: "whole number", float: "number", bool: "true, false", str: "text"}.get(hint, "table")


def _plain(annotation: str) -> str:
    """The annotation of a TaskSpec field in words."""
    words = {"str": "text", "int": "whole number", "bool": "true, false", "Sequence[str]": "list: text"}
    words |= {"Mapping[str, str]": "table", "Mapping[str, float]": "table"}
    return " or ".join(words.get(part, part) for part in annotation.split(" | "))


def _cell(text: str) -> str:
    """Text inside a cell of a Markdown table."""
    return text.replace("|", "\\|")


def main() -> None:
    """Write docs/cli.md below the present folder."""
    files.atomic_write(Path("docs/cli.md"), text())


if __name__ == "__main__":
    main()
