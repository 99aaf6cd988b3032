"""What is wrong with a recipe, each as "path: what; got; do", and the texts of --set."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from incipit.errors import RecipeError, nearest

T = TypeVar("T")

_NEEDS = {  # pydantic's error type -> what the key needs; {..} is its bound
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "int_parsing": "a whole number",
    "bool_parsing": "true or false",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "tuple_type": "a list in square brackets",
    "list_type": "a list in square brackets",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "dataclass_type": "a table",
    "mapping_type": "a table",
    "is_instance_of": "a table",
    "dict_type": "a table",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number from {ge}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number up to {le}",
    "string_pattern_mismatch": "letters, digits, dots, dashes and underscores",
}


def listed(problems: Sequence[str], source: str) -> str:
    """One message of all problems."""
    if len(problems) == 1:
        return f"{source}: {problems[0]}"
    return f"{source}: {len(problems)} problems:\n  " + "\n  ".join(problems)


def overridden(table: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The table with every "a.b=value" put in, and the problems of those texts.

    A value is read as TOML ("20", "[0, 1]", "true", "{validation = 0.1}") and is plain text where that fails.
    """
    merged: dict[str, Any] = copy.deepcopy(dict(table))
    found = []
    for text in overrides:
        path, equals, value = text.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or not all(keys):
            move = "write a path and a value: prompt.length=20"
            found.append(f"--set {text}: is no setting; got {text!r}; {move}")
            continue
        inner: Any = merged
        for depth, key in enumerate(keys[:-1]):
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                outer = ".".join(keys[: depth + 1])
                found.append(f"{path.strip()}: {outer} is no table; got {inner!r}; set it whole")
                break
        else:
            inner[keys[-1]] = _value(value.strip())
    return merged, found


def _value(text: str) -> Any:
    try:
        value = tomllib.loads(f"x = {text}")
    except tomllib.TOMLDecodeError:
        return text
    plain = set(value) == {"x"} and isinstance(value["x"], (bool, int, float, str, list, dict))
    return value["x"] if plain else text  # a date is a text here, and so is what closes the line and goes on


def worded(error: ValidationError, model: type[Any]) -> list[str]:
    """pydantic's complaints in the words of the house."""
    return [_worded(one, model) for one in error.errors()]


def _worded(one: ErrorDetails, model: type[Any]) -> str:
    path = ".".join(str(part) for part in one["loc"])
    kind, got, bounds = one["type"], one["input"], one.get("ctx", {})
    keys = [str(part) for part in one["loc"] if isinstance(part, str)]
    owner, field = _owner(model, keys)
    if kind == "extra_forbidden":
        return f"{path}: unknown key{nearest(keys[-1], _fields(owner))}"
    if kind in ("missing", "missing_argument"):
        return f"{path}: missing; write {keys[-1]} = ..."
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", bounds.get("expected", ""))
        listing = ", ".join(json.dumps(word) for word in known)
        return f"{path}: needs one of {listing}; got {got!r}{_close(got, known)}"
    need = _NEEDS.get(kind, one["msg"].lower()).format_map(bounds)
    if kind == "greater_than_equal" and isinstance(got, int):
        need = need.replace("a number", "a whole number")
    default = _default(owner, field)
    return f"{path}: needs {need}; got {got!r}; {default}"


def _close(got: Any, known: Sequence[str]) -> str:
    hint = nearest(str(got), [word for word in known if word])
    return hint if "did you mean" in hint else "; choose one"


def _owner(model: type[Any], keys: Sequence[str]) -> tuple[type[Any], str]:
    """The table that holds the last of `keys`."""
    owner = model
    for key in keys[:-1]:
        inner = _types(owner).get(key)
        if not (isinstance(inner, type) and _fields(inner)):
            return owner, key
        owner = inner
    return owner, keys[-1] if keys else ""


def _fields(owner: type[Any]) -> list[str]:
    if issubclass(owner, BaseModel):
        return list(owner.model_fields)
    return [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []


def _types(owner: type[Any]) -> Mapping[str, Any]:
    if issubclass(owner, BaseModel):
        return {name: plain(field.annotation) for name, field in owner.model_fields.items()}
    return typing.get_type_hints(owner) if dataclasses.is_dataclass(owner) else {}


def plain(annotation: Any) -> Any:
    """The table of a table that may be absent: X of `X | None`; any other annotation as it is."""
    tables = [t for t in typing.get_args(annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
    return tables[0] if tables else annotation


def _default(owner: type[Any], name: str) -> str:
    """What to do: the default is a value that fits."""
    value: Any = None
    if issubclass(owner, BaseModel) and name in owner.model_fields:
        value = owner.model_fields[name].default
    elif dataclasses.is_dataclass(owner):
        value = next((f.default for f in dataclasses.fields(owner) if f.name == name), None)
    if isinstance(value, (bool, int, float, str)):
        return f"the default is {json.dumps(value)}"
    if isinstance(value, tuple):
        return f"the default is {json.dumps(list(value))}"
    return f"write it as [{name}]" if isinstance(value, BaseModel) or name == "task" else "mend that line"


def settings_of(
    cls: type[T], table: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "the recipe"
) -> T:
    """A dataclass of settings from tables and "a.b=value" texts; raises one RecipeError like Recipe.of."""
    merged, found = overridden(table, overrides)
    found += _strangers(cls, merged, "")
    made = None
    try:
        made = TypeAdapter(cls).validate_python(merged)
    except ValidationError as error:
        found += worded(error, cls)
    if found or made is None:
        raise RecipeError(listed(found, source))
    return made


def _strangers(cls: type[Any], table: Mapping[str, Any], path: str) -> list[str]:
    """Keys that a dataclass or the ones within it do not have; pydantic passes over them."""
    types = _types(cls)
    found = [f"{path}{key}: unknown key{nearest(key, types)}" for key in table if key not in types]
    for key, inner in types.items():
        if (
            dataclasses.is_dataclass(inner)
            and isinstance(inner, type)
            and isinstance(table.get(key), Mapping)
        ):
            found += _strangers(inner, table[key], f"{path}{key}.")
    return found
