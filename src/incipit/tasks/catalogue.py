"""Text forms of published data sets in T5's manner, without the task's name; a form and your data are a task.

    [task]
    form = "superglue/boolq"
    data = "data/boolq"       # a folder with train.* and validation.*, or "hub"

Raffel et al. 2020, appendix D, as Lester et al. 2021, section 3 use it: field names stay, the task's name goes. Each
file of published/ holds worked examples, which the tests check. A key of [task] replaces the form's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from incipit import files
from incipit.errors import RecipeError, nearest

PUBLISHED = Path(__file__).parent / "published"
KEYS = ("form", "data")  # what [task] takes beside the keys of a TaskSpec
SPLITS = {
    "train": "train",
    "validation": "validation",
}  # where a form names no others: test labels are not public


def names() -> tuple[str, ...]:
    """All forms, as "superglue/boolq"."""
    found = (p.relative_to(PUBLISHED) for p in PUBLISHED.glob("*/*.toml"))
    return tuple(sorted(p.with_suffix("").as_posix() for p in found))


def published(form: str) -> dict[str, Any]:
    """One form's file: keys of a TaskSpec, hub, splits, worked. RecipeError for an unknown one."""
    if form not in names():
        raise RecipeError(f"form: {form!r} is unknown{nearest(form, names())}")
    return files.read_toml(PUBLISHED / f"{form}.toml")


def expanded(table: Mapping[str, Any]) -> dict[str, Any]:
    """A [task] table with `form` and `data` written out as keys of a TaskSpec.

    With split.validation the checkpoint is chosen on a part of train, and the official validation split becomes the
    test, read once: the labels of most tests are not public, and a score that chose the checkpoint is no result.
    Raises RecipeError for an unknown form, for data without a form, and where the form's data is not named.
    """
    if "form" not in table:
        if "data" in table:
            raise RecipeError("data: stands beside a form; name train, validation and test, or a form")
        return dict(table)
    own = published(str(table["form"]))
    places = _places(own, table)
    spec = {k: v for k, v in own.items() if k not in ("hub", "splits", "worked")}
    given = {k: v for k, v in table.items() if k not in KEYS}
    return spec | places | given


def _places(own: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, str]:
    splits: dict[str, str] = dict(own.get("splits", SPLITS))
    data, hub = str(table.get("data", "")), str(own.get("hub", ""))
    if not data and not any(key in table for key in ("train", "validation", "test")):
        where = f', or "hub" for hub:{hub}' if hub else ""
        raise RecipeError(f"data: missing for the form {table['form']!r}; name a folder of its files{where}")
    if not data:
        return {}
    if data == "hub" and not hub:
        raise RecipeError(f"data: the form {table['form']!r} has no hub id; name a folder of its files")
    if isinstance(table.get("split"), Mapping) and "validation" in table["split"]:
        known = splits.pop("validation", None)
        if known and "test" not in splits:
            splits["test"] = known
    source = f"hub:{hub}" if data == "hub" else data
    return {split: f"{source}:{name}" for split, name in splits.items()}
