"""`incipit serve` as a process of its own over real artifacts, and `incipit predict --server`."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from incipit import artifact
from incipit.assemble import PromptChoice, make_prompt
from incipit.backbones import Backbone, load, tiny
from incipit.cli import main
from incipit.cli.serve import _threads
from incipit.errors import DataError, ServeError

PATIENCE = 90  # seconds; a bound for a machine that is frozen
RECIPE = {"name": "short", "task": {"builtin": "reviews"}, "decode": {"max_new_tokens": 4}}
START = "import sys; from incipit.cli import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts of one tiny causal model: mood chooses, short writes."""
    folder = tmp_path_factory.mktemp("served")
    tiny.save("llama", folder / "llama")
    backbone = load(str(folder / "llama"), device="cpu")
    save(
        folder / "library" / "mood",
        backbone,
        {"kind": "classification", "input": "Review: {text}", "words": ["bad", "good"]},
    )
    save(folder / "library" / "short", backbone, {"kind": "text", "input": "{text} so"}, RECIPE)
    return folder


def save(place: Path, backbone: Backbone, task: Any, recipe: Any = None) -> None:
    prompt = make_prompt(PromptChoice(length=3), backbone, ["good", "bad"])
    assert prompt is not None
    artifact.save(place, prompt=prompt, backbone=backbone, name=place.name, task=task, recipe=recipe)


@contextmanager
def process(library: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port, and where it listens."""
    command = [
        sys.executable,
        "-c",
        START,
        "serve",
        str(library / "library"),
        "--backbone",
        str(library / "llama"),
    ]
    ours = str(Path(artifact.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([ours, os.environ.get("PYTHONPATH", "")])}
    found = subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu", "--timeout", "600", *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    said: list[str] = []
    assert found.stdout is not None and found.stderr is not None
    reader = threading.Thread(
        target=lambda: said.extend(found.stderr), daemon=True
    )  # a full pipe would halt it
    reader.start()
    line = found.stdout.readline()
    try:
        assert "prompts over" in line, "".join(said)
        url = line.rsplit(" ", 1)[1].strip()
        until_ready(url)
        yield found, url
    finally:
        found.kill()
        found.wait(PATIENCE)
        reader.join(PATIENCE)
        found.stdout.close()
        found.stderr.close()


def until_ready(url: str) -> None:
    pause = threading.Event()
    for _ in range(PATIENCE * 20):
        if httpx.get(f"{url}/readyz", timeout=PATIENCE).status_code == 200:
            return
        pause.wait(0.05)
    raise AssertionError(httpx.get(f"{url}/readyz", timeout=PATIENCE).text)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out.splitlines(), said.err


@pytest.mark.slow
def test_a_server_predicts_what_predict_does_and_ends_well(
    library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [part for text in ("a great film", "the bad one") for part in ("--text", text)]
    places = [str(library / "library" / name) for name in ("mood", "short")]
    here = run(capsys, "predict", *places, *texts, "--backbone", str(library / "llama"))
    with process(library) as (server, url):
        there = run(capsys, "predict", "mood", "short", *texts, "--server", url)
        assert there[2] == here[2] and there == here and len(here[1]) == 4
        code, _, err = run(capsys, "predict", "moood", "--text", "x", "--server", url)
        assert code == 1 and "did you mean 'mood'?" in err
        assert httpx.get(f"{url}/v1/models", timeout=PATIENCE).json()["data"][0]["id"] == "llama"
        drain_under_load(server, url)


def drain_under_load(server: subprocess.Popen[str], url: str) -> None:
    """SIGTERM while requests run: those that were taken are answered, new ones are not, the exit status is 0."""
    body = {
        "model": "short",
        "prompt": ["a great film"] * 16,
        "max_tokens": 60,
        "ignore_eos": True,
        "stream": True,
    }
    started = threading.Barrier(5)

    def ask() -> str:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as reply:
            assert reply.status_code == 200
            parts = reply.iter_text()
            first = next(parts)
            started.wait(PATIENCE)
            return first + "".join(parts)

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask) for _ in range(4)]
        started.wait(PATIENCE)
        server.send_signal(signal.SIGTERM)
        answers = [one.result(PATIENCE) for one in asked]
    for answer in answers:
        assert answer.endswith("data: [DONE]\n\n") and answer.count('"finish_reason": "length"') == 16
        assert '"error"' not in answer
    assert server.wait(PATIENCE) == 0


def test_no_server_there(capsys: pytest.CaptureFixture[str]) -> None:
    from incipit.serve.http.server import listening

    with listening("127.0.0.1", 0) as nobody:  # bound, not listening
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        code, _, err = run(capsys, "predict", "mood", "--text", "x", "--server", url)
    assert code == 1 and "start one with `incipit serve`" in err
    code, _, err = run(capsys, "predict", "mood", "--text", "x", "--server", "localhost:80")
    assert code == 1 and "is no address of a server" in err


def test_an_address_that_is_taken(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from incipit.serve.http.server import listening

    with listening("127.0.0.1", 0) as first:
        first.listen()
        code, _, err = run(
            capsys,
            "serve",
            str(library / "library"),
            "--backbone",
            "nowhere",
            "--port",
            str(first.getsockname()[1]),
        )
    assert code == 1 and "choose another --host or --port" in err


def test_a_file_without_keys(tmp_path: Path, library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_text("# none yet\n", encoding="utf-8")
    code, _, err = run(
        capsys, "serve", str(library), "--backbone", "nowhere", "--keys", str(tmp_path / "keys")
    )
    assert code == 1 and "holds no key" in err


@pytest.mark.parametrize(
    ("cores", "work", "threads"),
    [(1, 1e6, 1), (2, 1e8, 1), (2, 1e10, 2), (4, 1e10, 4), (4, 1e8, 3), (16, 1e12, 15)],
)
def test_a_core_is_left_to_http_where_the_model_can_spare_it(cores: int, work: float, threads: int) -> None:
    assert _threads(cores, work) == threads


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"id": "mood"}  ', "tells no text forms"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "tells no text forms"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"id": ', "no server of prompts answers"),
        (b"220 mail.example ESMTP\r\n", "no server of prompts answers"),
    ],
)
def test_what_is_no_server_of_prompts(reply: bytes, says: str) -> None:
    """Another kind of server, and one that dies in the middle of a word."""
    from incipit.serve.client import Client
    from incipit.serve.http.server import listening

    with listening("127.0.0.1", 0) as sock:
        sock.listen()

        def answer() -> None:
            connection, _ = sock.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ServeError, match=says):
            Client(f"http://127.0.0.1:{sock.getsockname()[1]}").prompt("mood")
        thread.join(PATIENCE)


def test_a_variable_without_a_key_does_not_open_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from incipit.cli.serve import KEY, _keys

    monkeypatch.setenv(KEY, "  ")
    with pytest.raises(DataError, match="INCIPIT_API_KEY holds no key: set it to one, or unset it"):
        _keys(None, KEY)
    monkeypatch.setenv(KEY, "")
    assert not _keys(None, KEY)
    monkeypatch.setenv(KEY, "0123456789abcdef")
    assert _keys(None, KEY).name("Bearer 0123456789abcdef") == "key-1"
