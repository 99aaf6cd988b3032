"""Help without torch, nearest names for misspelt ones, exit codes, and errors without a traceback."""

import errno
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from incipit import __version__, cli
from incipit.errors import Interrupted, TrainingError
from incipit.recipe import Recipe

from .conftest import Call, write_recipe


@pytest.mark.parametrize("verb", ["", *cli.VERBS])
def test_help_is_quick_and_loads_no_torch(verb: str) -> None:
    program = textwrap.dedent(f"""
        import atexit, json, sys, time
        start = time.process_time()
        heavy = ("torch", "transformers", "numpy", "datasets", "matplotlib")
        def told():
            loaded = [name for name in heavy if name in sys.modules]
            print(json.dumps([loaded, time.process_time() - start]), file=sys.stderr)
        atexit.register(told)
        from incipit.cli import main
        main({[verb, "--help"] if verb else ["--help"]})
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    loaded, seconds = json.loads(done.stderr)
    assert done.returncode == 0 and f"Usage: incipit {verb}".strip() in done.stdout
    assert loaded == []
    assert seconds < 2  # of the processor: 0.1 is usual, only a heavy import comes near 2


def test_no_arguments_show_the_verbs(call: Call) -> None:
    done = call()
    assert done.code == 2
    for verb in cli.VERBS:
        assert f"\n  {verb} " in done.out + done.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tunne a.toml", "No such command 'tunne'. Did you mean 'tune', 'prune'?"),
        ("tune --overwite a.toml", "No such option: --overwite (Possible options: --overwrite)"),
        ("tune", "Missing argument 'RECIPE"),
        ("tune a.toml --resume --overwrite", "--resume goes on with a run and --overwrite replaces it"),
        ("evaluate a --task reviews --data b.jsonl", "give one of them"),
        ("evaluate a --split dev", "--split dev: is no split; write train, validation or test"),
        ("predict a", "give the inputs once: --text TEXT, a FILE, or - for standard input"),
        (
            "predict a none.csv",
            "give the inputs once: --text TEXT, a FILE, or - for standard input; there is no file 'none.csv'",
        ),
        ("predict -", "no ARTIFACT before '-'; name the folder of a prompt"),
        ("predict a - --text b", "give the inputs once"),
        ("export a --folder b --to pfet", "'pfet' is not one of 'peft', 'peft-prefix', 'vllm'"),
        (
            "export a b --folder c --to peft",
            "an adapter holds one prompt, 2 are given: export each by itself",
        ),
        (
            "import a.npy --format npy --folder b",
            "'a.npy' names no model: give the one it was trained on with",
        ),
        ("show a --neighbours -1", "Invalid value for '--neighbours'"),
    ],
)
def test_wrong_usage(call: Call, line: str, words: str) -> None:
    done = call(*line.split())
    assert done.code == 2
    assert words in " ".join(done.err.split())


def test_the_version(call: Call) -> None:
    assert call("--version").lines == [f"incipit {__version__}"]


def test_a_long_text_in_place_of_a_file_is_no_crash(call: Call, tmp_path: Path) -> None:
    done = call("predict", tmp_path, "a kettle " * 100)  # longer than a file's name may be
    assert done.code == 2 and "give the inputs once: --text TEXT, a FILE" in " ".join(done.err.split())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tune reviews.toml --json .", "'.' is a folder: name a file"),
        ("tune reviews.toml --json note.txt/a.json", "writing 'note.txt/a.json' failed: Not a directory"),
        ("tune reviews.toml --folder note.txt", "'note.txt' is a file: name a folder"),
        ("tune reviews.toml --folder s3://bucket/a", "is an address: name a folder of this machine"),
        (
            "tune review.toml",
            "reading 'review.toml' failed: No such file or directory; did you mean 'reviews.toml'?",
        ),
        ("tune else.md", "reading 'else.md' failed: No such file or directory; check the path and the disk"),
    ],
)
def test_places_are_looked_at_before_any_work(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("reviews.toml", "note.txt"):
        (tmp_path / name).write_text("no recipe", encoding="utf-8")
    done = call(*line.split())
    assert done.code in (1, 2) and words in " ".join(done.err.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["note.txt", "reviews.toml"]


def test_a_place_that_may_not_be_looked_at(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = Path.stat

    def refuse(path: Path, **more: bool) -> object:
        if "theirs" in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, **more)

    monkeypatch.setattr(Path, "stat", refuse)
    done = call("show", "theirs")
    assert done.code == 1 and "Traceback" not in done.err
    assert "theirs/card.json' failed: Permission denied; check its permissions" in done.err


@pytest.mark.parametrize("absent", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_server_without_its_packages(call: Call, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    done = call("serve", "library", "--backbone", "builtin:lm")
    package = absent.replace("_", "-")
    assert done.code == 1
    assert done.err == f"incipit: the server needs {package}: pip install {package}\n"


def test_an_error_is_a_message_and_debug_shows_where(call: Call, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "a.toml", Path("llama"))
    done = call("tune", recipe, "--set", "prompt.lenght=3")
    assert done.code == 1 and done.out == ""
    assert done.err == f"incipit: {recipe}: prompt.lenght: unknown key; did you mean 'length'?\n"
    shown = call("tune", recipe, "--set", "prompt.lenght=3", "--debug")
    assert shown.code == 1 and "Traceback" in shown.err and "did you mean 'length'?" in shown.err


def test_a_missing_recipe(call: Call, tmp_path: Path) -> None:
    done = call("tune", tmp_path / "none.toml")
    assert done.code == 1 and "none.toml' failed: No such file or directory" in done.err


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (Interrupted("saved; go on with --resume"), 130), (TrainingError("NaN"), 1)],
)
def test_exit_codes(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def stop(*_: object) -> Recipe:
        raise error

    monkeypatch.setattr(Recipe, "read", stop)
    done = call("tune", tmp_path / "a.toml")
    assert done.code == code and "Traceback" not in done.err
    assert str(error) in done.err


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_too_little_memory_says_what_to_set(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def stop(*_: object) -> Recipe:
        raise error

    monkeypatch.setattr(Recipe, "read", stop)
    done = call("tune", tmp_path / "a.toml")
    assert done.code == 1 and done.err.startswith("incipit: there is not enough memory: --debug shows where")
    assert "train.memory" in done.err and "decode.batch" in done.err and "--slots" in done.err
    with pytest.raises(type(error)):
        cli.main(["tune", str(tmp_path / "a.toml"), "--debug"])


def test_another_fault_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> Recipe:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Recipe, "read", stop)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main(["tune", str(tmp_path / "a.toml")])


def test_a_closed_pipe_is_quiet() -> None:
    program = "import sys; sys.stdin.read(); from incipit.cli import main; main(['--help'])"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe) as writer:
        assert writer.stdin and writer.stdout and writer.stderr
        writer.stdout.close()  # the reader is gone before anything is written
        writer.stdin.close()
        assert writer.stderr.read() == b""
