"""The README's tree is the tree: every top-level name, and src/incipit two levels deep."""

import re
from pathlib import Path

LINE = re.compile(r"^(?P<indent>(?:  )*)(?P<name>\S+) {2,}(?P<says>\S.*)$")


def drawn(readme: str) -> list[str]:
    """Paths of the tree block, folders with a slash at the end.

    A line is two spaces a level, the name, two spaces or more, what it is.
    """
    block = readme.split("## The tree", 1)[1].split("```", 2)[1].strip("\n")
    open_folders: list[str] = []
    paths = []
    for line in block.splitlines():
        match = LINE.match(line)
        assert match, f"README tree: {line!r} is not 'indent name  what it is'"
        depth = len(match["indent"]) // 2
        assert depth <= len(open_folders), f"README tree: {line!r} is indented below no folder"
        path = "".join(open_folders[:depth]) + match["name"]
        paths.append(path)
        if match["name"].endswith("/"):
            open_folders = [*open_folders[:depth], match["name"]]
    return paths


def on_disk(files: list[str]) -> set[str]:
    """Every tracked file, and every folder that holds one, with a slash."""
    folders = {"/".join(file.split("/")[:n]) + "/" for file in files for n in range(1, file.count("/") + 1)}
    return folders | set(files)


def wanted(paths: set[str]) -> set[str]:
    """Top level, and two levels below src/incipit; a folder's line speaks for its __init__.py."""
    keep = set()
    for path in paths:
        parts = path.strip("/").split("/")
        deep = (
            parts[:2] == ["src", "incipit"]
            and len(parts) <= 4
            and not (len(parts) == 4 and parts[3] == "__init__.py")
        )
        if len(parts) == 1 or path == "src/incipit/" or deep:
            keep.add(path)
    return keep


def test_the_tree_of_the_readme(root: Path, tracked: list[str]) -> None:
    there, shown = on_disk(tracked), drawn((root / "README.md").read_text(encoding="utf-8"))
    faults = [f"missing in the README's tree: {path}" for path in sorted(wanted(there) - set(shown))]
    gone = [path for path in shown if path not in there and not (root / path).exists()]
    faults += [f"in the README's tree, but nowhere else: {path}" for path in gone]
    faults += [f"twice in the README's tree: {path}" for path in sorted(set(shown)) if shown.count(path) > 1]
    assert not faults, "\n".join(faults)


def test_the_reader_of_the_tree() -> None:
    block = "README.md  this\nsrc/  code\n  incipit/  package\n    a.py  one\ndocs/  pages\n"
    text = f"## The tree\n\n```\n{block}```\n"
    assert drawn(text) == ["README.md", "src/", "src/incipit/", "src/incipit/a.py", "docs/"]
    files = [
        "README.md",
        "src/incipit/tasks/__init__.py",
        "src/incipit/tasks/builtin/x/task.toml",
        "docs/a/b.md",
    ]
    assert wanted(on_disk(files)) == {
        "README.md", "docs/", "src/", "src/incipit/", "src/incipit/tasks/", "src/incipit/tasks/builtin/",
    }  # fmt: skip
