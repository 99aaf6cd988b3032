"""Imports run down the layers only; siblings of one number never import one another, except in one folder."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# Files and folders directly under src/incipit. A new one gets its line here and in the README's tree,
# and its reason in the commit.
LAYERS = {
    "errors": 0,
    "files": 0,
    "batch": 0,
    "injection": 0,
    "tasks": 1,
    "prompts": 1,
    "backbones": 1,
    "assemble": 2,
    "encode": 2,
    "questions": 2,
    "cards": 1,
    "artifact": 2,
    "record": 2,
    "train": 3,
    "decode": 3,
    "anatomy": 3,
    "library": 3,
    "pruning": 4,
    "ensemble": 4,
    "transfer": 4,
    "interop": 4,  # run.py starts prompts from foreign files
    "recipe": 5,
    "baselines": 6,
    "evaluation": 5,
    "run": 6,
    "demo": 7,  # composes runs and baselines
    "pretrain": 6,
    "serve": 7,
    "study": 7,
    "cli": 8,
    "__main__": 9,
}
# errors.py imports nothing and everybody raises from it, its neighbours on layer 0 too.
OPEN_TO_SIBLINGS = {"errors"}


def imported(path: str, tree: ast.Module) -> set[str]:
    """Units that a file imports: at the top, inside functions, for type checkers, by import_module("...")."""
    package = ["incipit", *Path(path).parts[:-1]]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("import_module", "importlib.import_module")
            and isinstance(node.args[0], ast.Constant)
        ):
            names.add(str(node.args[0].value))
    return {name.split(".")[1] for name in names if name.startswith("incipit.")}


def unit_of(path: str) -> str:
    return Path(path).parts[0].removesuffix(".py")


def broken(path: str, tree: ast.Module) -> list[str]:
    here = unit_of(path)
    units = imported(path, tree)
    if here == "__init__":
        return [
            f"{path} imports incipit.{unit}: the package resolves its names lazily" for unit in sorted(units)
        ]
    if here not in LAYERS:
        return [f"{path}: {here!r} has no layer; give it one in tests/house/test_layers.py"]
    faults = []
    for unit in sorted(units - {here, "__version__"}):
        if unit not in LAYERS:
            faults.append(
                f"{path} imports incipit.{unit}: no layer of LAYERS; name the module that defines it"
            )
        elif LAYERS[unit] > LAYERS[here]:
            faults.append(f"{path} (layer {LAYERS[here]}) imports {unit} (layer {LAYERS[unit]}) above it")
        elif LAYERS[unit] == LAYERS[here] and unit not in OPEN_TO_SIBLINGS:
            faults.append(f"{path} imports its sibling {unit} (both layer {LAYERS[here]})")
    return faults


def test_imports_run_down(sources: dict[str, ast.Module]) -> None:
    faults = [fault for path, tree in sources.items() for fault in broken(path, tree)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("path", "line", "fault"),
    [
        ("prompts/inputs.py", "from incipit.tasks.task import Task", "its sibling tasks"),
        ("prompts/inputs.py", "from ..backbones import load", "its sibling backbones"),
        ("batch.py", "import incipit.injection", "its sibling injection"),
        ("batch.py", "def f():\n    from incipit import cli", "cli (layer 8) above it"),
        ("batch.py", "import_module('incipit.run')", "run (layer 6) above it"),
        ("run.py", "from incipit import Backbone", "the module that defines it"),
        ("helpers.py", "", "has no layer"),
        ("__init__.py", "from incipit.errors import DataError", "lazily"),
    ],
)
def test_the_rule_bites(path: str, line: str, fault: str) -> None:
    (found,) = broken(path, ast.parse(line))
    assert fault in found


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("prompts/inputs.py", "from . import starts"),
        ("prompts/inputs.py", "from ..injection import Injection"),
        ("files/disk.py", "from incipit.errors import StorageError"),
        ("record.py", "from incipit import __version__"),
        ("cli/train.py", "from incipit.run import run"),
    ],
)
def test_what_runs_down_is_free(path: str, line: str) -> None:
    assert broken(path, ast.parse(line)) == []


@pytest.mark.parametrize("module", ["incipit", "incipit.cli"])
def test_import_is_light_and_changes_nothing(module: str, root: Path) -> None:
    source = root / "src" / Path(*module.split("."))
    if not (source / "__init__.py").exists() and not source.with_suffix(".py").exists():
        pytest.skip(f"{module} does not exist yet")
    program = textwrap.dedent(f"""
        import logging, os, sys, warnings
        before = dict(os.environ), list(warnings.filters), list(logging.root.handlers), logging.root.level
        import {module}
        after = dict(os.environ), list(warnings.filters), list(logging.root.handlers), logging.root.level
        heavy = ["torch", "transformers", "datasets", "sklearn", "numpy", "matplotlib", "peft"]
        print([name for name in heavy if name in sys.modules], before == after)
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root / "src")
    assert done.stdout.split() == ["[]", "True"], f"importing {module}: {done.stdout}{done.stderr}"
