"""Hard bounds. A file near 300 lines or a function near 50 already asks: what are its two subjects?"""

import ast
from pathlib import Path

FILE_LINES = 400
FUNCTION_LINES = 80


def functions(tree: ast.Module) -> list[tuple[str, int, int]]:
    """Name, first line and number of lines of every function and method, decorators not counted."""
    return [
        (node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_files_stay_short(root: Path, sources: dict[str, ast.Module]) -> None:
    lengths = {
        path: len((root / "src/incipit" / path).read_text(encoding="utf-8").splitlines()) for path in sources
    }
    faults = [
        f"{path}: {lines} lines, the bound is {FILE_LINES}"
        for path, lines in lengths.items()
        if lines > FILE_LINES
    ]
    assert not faults, "\n".join(faults)


def test_functions_stay_short(sources: dict[str, ast.Module]) -> None:
    faults = [
        f"{path}:{line} {name}: {lines} lines, the bound is {FUNCTION_LINES}"
        for path, tree in sources.items()
        for name, line, lines in functions(tree)
        if lines > FUNCTION_LINES
    ]
    assert not faults, "\n".join(faults)


def test_how_lines_are_counted() -> None:
    assert functions(ast.parse("@d\ndef f():\n    1\n    2\n")) == [("f", 2, 3)]
