"""files/ is the only disk code: what it writes is whole or absent, and its errors say the next move."""

import ast

import pytest

# Called bare, or as the last part of anything: open(...), path.read_text(), fsspec.open(...), save_file(...).
# A TemporaryDirectory is free: nobody finds it half written.
ANYWHERE = {
    "open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "makedirs", "unlink", "rmtree",
    "safe_open", "save_file", "load_file", "save_model", "load_model", "save_pretrained",
}  # fmt: skip
# Only from these modules: `replace` and `load` mean other things elsewhere.
QUALIFIED = {
    "torch": {"save", "load"},
    "np": {"save", "load", "savez", "savez_compressed", "savetxt", "loadtxt", "memmap"},
    "json": {"dump", "load"},
    "tomllib": {"load"},
    "tomli_w": {"dump"},
    "os": {"replace", "rename", "remove", "link", "symlink"},
    "shutil": {"copy", "copyfile", "copytree", "move"},
}
# (file, call): why this one does not go through files/.
SHELF = "interop/vllm/incipit_prompts/shelf.py"  # runs in vLLM's environment, without incipit
ALLOWED: dict[tuple[str, str], str] = {
    ("backbones/tiny.py", "save_pretrained"): "a random model as a folder, for tests of loading",
    (SHELF, "read_text"): "reads its own bundle where incipit is not installed",
    (SHELF, "safe_open"): "maps its own bundle where incipit is not installed",
    (SHELF, "torch.save"): "writes into a BytesIO that goes into a request",
    ("pretrain/exported.py", "save_pretrained"): "the model writes its own folder, inside atomic_folder",
    ("tasks/raw.py", "np.save"): "writes into a BytesIO that atomic_write puts on the disk",
    ("tasks/raw.py", "np.load"): "maps the token file instead of reading it; inside files.storage",
    ("tasks/raw.py", "unlink"): "an old card must not stand beside a new array",
    ("tasks/vocabulary.py", "save_pretrained"): "the tokenizer writes its own folder, inside atomic_folder",
}


def disk_calls(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and dotted name of every call that touches the disk."""
    calls = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in ANYWHERE:
            calls.append((node.lineno, node.func.id))
        elif isinstance(node.func, ast.Attribute):
            last, owner = node.func.attr, ast.unparse(node.func.value)
            if last in ANYWHERE:
                calls.append((node.lineno, last))
            elif last in QUALIFIED.get(owner.replace("numpy", "np"), ()):
                calls.append((node.lineno, f"{owner}.{last}"))
    return calls


def test_only_files_touches_the_disk(sources: dict[str, ast.Module]) -> None:
    faults, used = [], set()
    for path, tree in sources.items():
        for line, call in disk_calls(tree) if not path.startswith("files/") else []:
            if (path, call) in ALLOWED:
                used.add((path, call))
            else:
                faults.append(f"{path}:{line} calls {call}: use incipit.files, or give a reason in ALLOWED")
    faults += [
        f"ALLOWED names {path} {call}, which is gone"
        for path, call in sorted(ALLOWED.keys() - used)
        if path in sources
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("open('a')", "open"),
        ("Path('a').write_text('b')", "write_text"),
        ("torch.save(x, 'a')", "torch.save"),
        ("os.replace('a', 'b')", "os.replace"),
        ("safetensors.torch.save_file({}, 'a')", "save_file"),
    ],
)
def test_the_rule_bites(line: str, call: str) -> None:
    assert disk_calls(ast.parse(line)) == [(1, call)]


def test_a_string_may_replace() -> None:
    assert disk_calls(ast.parse("'a'.replace('a', 'b'); dataclasses.replace(x); json.loads('1')")) == []
