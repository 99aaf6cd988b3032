"""What a bundle holds, and what is not written into one."""

import ast
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.interop.vllm.conftest import LENGTHS, kept, soft

from incipit import files
from incipit.artifact import Artifact
from incipit.backbones import Backbone, builtin, tiny, wrap
from incipit.cli import main
from incipit.errors import ArtifactError, InteropError, StorageError
from incipit.interop import vllm
from incipit.prompts import InputPrompt, PrefixPrompt


def test_what_it_holds(bundle: Path, shelved: dict[str, Artifact], llama: Backbone) -> None:
    assert files.folder_files(bundle) == [
        "README.md", "chat_template.jinja", "embeddings.safetensors", "manifest.json", "prompts.safetensors",
        "tokenizer.json",
    ]  # fmt: skip
    rows, _ = files.load_tensors(bundle / "prompts.safetensors")
    assert {name: tuple(t.shape) for name, t in rows.items()} == {n: (p + 1, 32) for n, p in LENGTHS.items()}
    assert torch.equal(rows["mood"][0], llama.embed([llama.tokenizer.bos_token_id])[0])
    table = files.load_tensors(bundle / "embeddings.safetensors")[0]["rows"]
    assert torch.equal(table, llama.model.get_input_embeddings().weight)
    manifest = files.read_json(bundle / "manifest.json")
    card = Path(shelved["mood"].place) / "card.json"
    assert manifest["prompts"]["mood"]["version"] == files.sha256_file(card)[:12]
    assert manifest["backbone"]["fingerprint"] == llama.fingerprint and manifest["no_chat"] == ""
    ids = [probe["ids"] for probe in manifest["probes"]]
    assert [len(i) for i in ids] == [9] * 4 and len(set(map(tuple, ids))) == 4  # the opening token, 8 others


def test_the_line_and_the_readme(bundle: Path, llama: Backbone) -> None:
    line = (
        "PYTHONPATH={0} vllm serve llama --dtype float32 --enable-prompt-embeds --middleware incipit_prompts.Prompts "
        "--generation-config vllm --chat-template {1}chat_template.jinja"
    )
    assert vllm.command(bundle, llama, True) == line.format(bundle, f"{bundle}/")
    readme = (bundle / "README.md").read_text(encoding="utf-8")
    assert line.format(".", "") in readme and "| `mood` | 5 | `Review: {text}` |" in readme
    assert "vLLM issue 57719" in readme


def test_a_table_in_the_type_that_holds_it(tmp_path: Path) -> None:
    half = wrap("half", *tiny.build("llama", dtype="bfloat16"))
    line = vllm.write([kept(tmp_path / "a", soft(half, 2, 0), half)], half, tmp_path / "bundle")
    assert "--dtype bfloat16" in line
    table = files.load_tensors(tmp_path / "bundle" / "embeddings.safetensors")[0]["rows"]
    assert table.dtype == torch.bfloat16 and torch.equal(table, half.model.get_input_embeddings().weight)


def test_the_middleware_imports_only_what_vllm_brings(bundle: Path) -> None:
    allowed = {"torch", "safetensors", "tokenizers"}
    sources = sorted((bundle / "incipit_prompts").glob("*.py"))
    assert {path.name for path in sources} == {"__init__.py", "asking.py", "replies.py", "shelf.py"}
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            found = {name.split(".")[0] for name in names}
            assert found <= allowed | set(sys.stdlib_module_names), f"{path}: {found}"


# -- what is refused -----------------------------------------------------------------------------------------


def t5(folder: Path) -> tuple[Artifact, Backbone]:
    backbone = wrap("t5", *tiny.build("t5"))
    return kept(folder, InputPrompt(backbone.geometry, 3), backbone), backbone


def prefix(folder: Path) -> tuple[Artifact, Backbone]:
    backbone = wrap("llama", *tiny.build("llama"))
    return kept(folder, PrefixPrompt(backbone.geometry, 3, rows=torch.ones(3, 64)), backbone), backbone


def foreign(folder: Path) -> tuple[Artifact, Backbone]:
    backbone = wrap("llama", *tiny.build("llama"))
    return kept(folder, soft(backbone, 3, 0), backbone), wrap("gpt2", *tiny.build("gpt2"))


def named_like_the_model(folder: Path) -> tuple[Artifact, Backbone]:
    backbone = wrap("a", *tiny.build("llama"))
    return kept(folder, soft(backbone, 3, 0), backbone), backbone


@pytest.mark.parametrize(
    ("case", "error", "says"),
    [
        (
            t5,
            InteropError,
            "is encoder-decoder, and vLLM takes prompt embeddings for decoder-only models alone: serve",
        ),
        (
            prefix,
            InteropError,
            "'a' enters as keys and values, for which vLLM has no place: train one of kind",
        ),
        (foreign, ArtifactError, "trained on 'llama', this is 'gpt2'"),
        (named_like_the_model, InteropError, "'a' names two prompts, or a prompt and the model: rename one"),
    ],
)
def test_what_is_not_written(
    case: Callable[[Path], tuple[Artifact, Backbone]], error: type[Exception], says: str, tmp_path: Path
) -> None:
    artifact, backbone = case(tmp_path / "a")
    with pytest.raises(error, match=says):
        vllm.write([artifact], backbone, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_numbers_and_shapes_that_were_damaged_in_memory(llama: Backbone, tmp_path: Path) -> None:
    one = kept(tmp_path / "a", soft(llama, 3, 0), llama)
    (name,) = one.tensors
    for value, error, says in (
        (
            torch.full((3, 32), torch.inf),
            InteropError,
            "'a' holds NaN or infinite numbers: its training diverged",
        ),
        (torch.zeros(3, 31), ArtifactError, f"tensors {name} do not fit the card"),
    ):
        changed = Artifact(one.place, one.card, {name: value})
        with pytest.raises(error, match=says):
            vllm.write([changed], llama, tmp_path / "bundle")


def test_places_and_names(llama: Backbone, tmp_path: Path) -> None:
    one = kept(tmp_path / "a", soft(llama, 3, 0), llama)
    cases: list[tuple[list[Artifact], Any, str]] = [
        ([], tmp_path / "b", "there is no prompt to export"),
        ([one, one], tmp_path / "b", "'a' names two prompts"),
        ([one], "memory://b", "is no local folder, and vLLM imports the bundle from one"),
    ]
    for given, place, says in cases:
        with pytest.raises(InteropError, match=says):
            vllm.write(given, llama, place)
    vllm.write([one], llama, tmp_path / "b")
    with pytest.raises(StorageError, match="--overwrite"):
        vllm.write([one], llama, tmp_path / "b")
    vllm.write([one], llama, tmp_path / "b", overwrite=True)


def test_a_tokenizer_that_is_no_file(
    llama: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = kept(tmp_path / "a", soft(llama, 3, 0), llama)
    monkeypatch.setattr(llama, "text_ids", lambda text: [7])
    with pytest.raises(InteropError, match="reads 'a film' otherwise than its own tokenizer"):
        vllm.write([one], llama, tmp_path / "b")
    monkeypatch.undo()
    monkeypatch.setattr(type(llama.tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(InteropError, match="is no single tokenizer"):
        vllm.write([one], llama, tmp_path / "b")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no') }}", "refuses a question and its answer (no)"),
        ("{{ bos_token }}x{{ bos_token }}{{ messages[-1].content }}", "other tokens"),
    ],
)
def test_chats_that_cannot_be_exact(
    template: str | None, says: str, llama: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.tokenizer, "chat_template", template)
    line = vllm.write([kept(tmp_path / "a", soft(llama, 3, 0), llama)], llama, tmp_path / "b")
    assert "--chat-template" not in line and not (tmp_path / "b" / "chat_template.jinja").exists()
    assert says in files.read_json(tmp_path / "b" / "manifest.json")["no_chat"]


# -- the command line ----------------------------------------------------------------------------------------


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def test_a_library_becomes_one_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save("llama", tmp_path / "llama")
    from incipit.backbones import load

    backbone = load(str(tmp_path / "llama"), device="cpu")
    for name in ("mood", "items"):
        kept(tmp_path / "library" / "deep" / name, soft(backbone, 3, 0), backbone)
    line = ("export", tmp_path / "library", "--to", "vllm", "--folder", tmp_path / "bundle")
    assert run(*line) == 0
    said = capsys.readouterr().out.splitlines()
    assert shlex.split(said[1])[:4] == [
        f"PYTHONPATH={tmp_path / 'bundle'}",
        "vllm",
        "serve",
        str(tmp_path / "llama"),
    ]
    assert set(files.read_json(tmp_path / "bundle" / "manifest.json")["prompts"]) == {"mood", "items"}
    assert run(*line) == 1 and "--overwrite" in capsys.readouterr().err
    files.atomic_write(tmp_path / "library" / "deep" / "mood" / "card.json", "{")
    assert run(*line, "--overwrite") == 1
    assert "is not valid JSON" in (err := capsys.readouterr().err) and "take it out of" in err
    assert run("export", tmp_path / "llama", "--to", "vllm", "--folder", tmp_path / "c") == 1
    assert "holds no artifact: give a folder that `incipit tune` wrote" in capsys.readouterr().err


def test_a_builtin_model_is_served_from_its_folder(llama: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "locate", lambda name: f"/weights/{name.removeprefix('builtin:')}")
    monkeypatch.setattr(llama, "name", "builtin:lm")
    assert vllm.command("b c", llama, False).startswith("PYTHONPATH='b c' vllm serve /weights/lm --dtype ")
