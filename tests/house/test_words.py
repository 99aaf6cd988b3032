"""One vocabulary (docs/vocabulary.md), no drawers for the unsorted, no trace of one machine."""

import ast
import re
from pathlib import Path

import pytest

# A prompt has a `length`. Formats of others (interop/) keep the words of their owners.
SYNONYMS = {
    "num_virtual_tokens",
    "n_virtual_tokens",
    "virtual_tokens",
    "num_prompt_tokens",
    "n_prompt_tokens",
    "prompt_len",
}
DRAWERS = {"utils", "util", "common", "helpers", "helper", "misc", "legacy"}
# Split so that this file does not hold what it looks for.
MACHINE = ["/" + "work/", "/" + "farm/", "/tmp/" + "bash", "../" + "shared", "/root" + "/", "/home" + "/"]
REGISTRIES = [
    "pypi" + ".org",
    "files.python" + "hosted",
    "deb." + "debian",
    "registry." + "npmjs",
    "download." + "pytorch",
]
TRACE = re.compile("|".join(map(re.escape, MACHINE + REGISTRIES)))
# The package index holds another project of this name: ours is installed from a folder, an address or a wheel.
BY_NAME = re.compile(r"\bpip3? install (?:-\S+ )*[\"']?incipit(?![\w./-])")


def identifiers(tree: ast.Module) -> set[str]:
    """Every name a file gives or uses: variables, attributes, arguments, keywords, functions, classes."""
    names: set[str | None] = set()
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name"):
            value = getattr(node, field, None)
            names |= {value} if isinstance(value, str) else set()
    return {name for name in names if name}


def test_one_vocabulary(sources: dict[str, ast.Module]) -> None:
    faults = [
        f"{path}: {word} is called `length` here"
        for path, tree in sources.items()
        if not path.startswith("interop/")
        for word in sorted(identifiers(tree) & SYNONYMS)
    ]
    assert not faults, "\n".join(faults)


def test_no_drawers(tracked: list[str]) -> None:
    faults = [path for path in tracked if DRAWERS & {part.split(".")[0] for part in path.split("/")}]
    assert not faults, f"name these by what they hold: {faults}"


def test_no_trace_of_a_machine(root: Path, tracked: list[str]) -> None:
    faults = []
    for path in tracked:
        content = (root / path).read_bytes()
        if b"\0" in content[:8192]:
            continue  # tensors, images
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), 1):
            if match := TRACE.search(line):
                faults.append(f"{path}:{number} holds {match[0]}")
    assert not faults, "\n".join(faults)


def test_nobody_is_told_to_install_another_project(root: Path, tracked: list[str]) -> None:
    pages = [path for path in tracked if path.endswith((".md", ".py", ".toml")) and "/house/" not in path]
    faults = [path for path in pages if BY_NAME.search((root / path).read_text(encoding="utf-8"))]
    assert not faults, f"write the place it is installed from: {faults}"


@pytest.mark.parametrize(
    "line", ["pip install incipit", "pip install -U incipit", "pip install 'incipit[serve]'"]
)
def test_the_search_for_another_project_bites(line: str) -> None:
    assert BY_NAME.search(line)
    assert not BY_NAME.search('pip install "path/to/incipit[serve]"')
    assert not BY_NAME.search("pip install incipit-0.1.0-py3-none-any.whl")


@pytest.mark.parametrize(
    "line", ["x = c.num_virtual_tokens", "f(prompt_len=3)", "def f(virtual_tokens): ..."]
)
def test_the_vocabulary_bites(line: str) -> None:
    assert identifiers(ast.parse(line)) & SYNONYMS


def test_the_search_for_traces_bites() -> None:
    assert TRACE.search("see /" + "work/main/x") and not TRACE.search("https://example.org/work")
