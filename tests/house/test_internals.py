"""Three files of backbones/ know Hugging Face internals; transformers itself stays inside backbones/."""

import ast

import pytest

INTERNALS = ("backbones/attend.py", "backbones/caches.py", "backbones/internals.py")
# (file, module): why this import stands outside attend.py or outside backbones/.
ALLOWED: dict[tuple[str, str], str] = {
    (
        "pretrain/model.py",
        "transformers",
    ): "the configurations and classes of the backbones that are made here",
    ("pretrain/run.py", "transformers"): "reads the tokenizer that it wrote",
    ("pretrain/exported.py", "transformers"): "the types of model and tokenizer, for the type checker only",
    ("tasks/raw.py", "transformers"): "the type of a tokenizer, for the type checker only",
    (
        "tasks/vocabulary.py",
        "transformers",
    ): "trains a tokenizer and wraps it as AutoTokenizer reads it; no model",
}


def transformers_imports(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and module of every import from transformers, anywhere in the file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.lineno, node.module))
    return [(line, module) for line, module in found if module.split(".")[0] == "transformers"]


def fault(path: str, module: str) -> str | None:
    if path in INTERNALS:
        return None
    if module != "transformers":
        return f"{module} is an internal: say what you need from it in one of {INTERNALS}"
    if not path.startswith("backbones/"):
        return "transformers stays inside backbones/"
    return None


def test_one_file_knows_hugging_face_internals(sources: dict[str, ast.Module]) -> None:
    faults, used = [], set()
    for path, tree in sources.items():
        for line, module in transformers_imports(tree):
            if (path, module) in ALLOWED:
                used.add((path, module))
            elif says := fault(path, module):
                faults.append(f"{path}:{line} {says}")
    faults += [
        f"ALLOWED names {path} {module}, which is gone"
        for path, module in sorted(ALLOWED.keys() - used)
        if path in sources
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("path", "line", "ok"),
    [
        ("backbones/attend.py", "from transformers.cache_utils import DynamicLayer", True),
        ("backbones/causal.py", "from transformers.cache_utils import DynamicLayer", False),
        ("backbones/causal.py", "import transformers.models.t5", False),
        ("backbones/causal.py", "from transformers import AutoModelForCausalLM", True),
        ("run.py", "def f():\n    from transformers import AutoModelForCausalLM", False),
        ("run.py", "from incipit.backbones import transformers", True),
    ],
)
def test_the_rule_bites(path: str, line: str, ok: bool) -> None:
    faults = [fault(path, module) for _, module in transformers_imports(ast.parse(line))]
    assert not any(faults) if ok else all(faults) and faults
