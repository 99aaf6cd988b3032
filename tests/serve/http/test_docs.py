"""docs/serving.md from top to bottom: its recipes, its server, its curl lines, its Python, on a random backbone."""

import json
import re
import shlex
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from incipit.backbones import tiny
from incipit.cli import main
from incipit.recipe import Recipe
from incipit.serve.http import server as servers

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.M | re.S)
FEW = ["train.steps=1", "train.batch=2", "train.eval_every=1", "task.limit=4", "train.eval_limit=2"]
PATIENCE = 90


class Background:
    """`incipit serve` in a thread, on a free port in place of the one that is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url = ""
        self.thread: threading.Thread | None = None
        self.made: list[servers.Server] = []
        real, listen, up = servers.Server, servers.listening, threading.Event()

        def make(gate: Any, **more: Any) -> servers.Server:
            def told(host: str, port: int) -> None:
                self.url = f"http://{host}:{port}"
                more_told(host, port)
                up.set()

            more_told = more.pop("told")
            self.made.append(real(gate, told=told, **more))
            return self.made[-1]

        self.up = up
        monkeypatch.setattr(servers, "Server", make)
        monkeypatch.setattr(servers, "listening", lambda host, _: listen(host, 0))

    def start(self, words: list[str]) -> None:
        self.thread = threading.Thread(target=self._main, args=(words,), daemon=True)
        self.thread.start()
        assert self.up.wait(PATIENCE)
        pause = threading.Event()
        for _ in range(PATIENCE * 20):
            if httpx.get(f"{self.url}/readyz", timeout=PATIENCE).status_code == 200:
                return
            pause.wait(0.05)
        raise AssertionError("not ready")

    def _main(self, words: list[str]) -> None:
        with pytest.raises(SystemExit):
            main(words)

    def stop(self) -> None:
        for made in self.made:
            made.drain()
        if self.thread is not None:
            self.thread.join(PATIENCE)
            assert not self.thread.is_alive()


@pytest.mark.slow
def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    monkeypatch.chdir(tmp_path)
    tiny.save("llama", tmp_path / "llama")
    read = Recipe.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Recipe, "of", classmethod(lambda cls, t, o=(), *r, **m: read(cls, t, [*o, *FEW], *r, **m))
    )
    background, names = Background(monkeypatch), {"__name__": "__main__"}
    try:
        for language, title, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
            text = text.replace("builtin:lm", str(tmp_path / "llama"))
            text = text.replace("http://127.0.0.1:8000", background.url or "http://127.0.0.1:8000")
            if title:
                (tmp_path / title).write_text(text, encoding="utf-8")
            elif language == "python":
                exec(compile(text, str(PAGE), "exec"), names)
            elif language == "bash":
                for line in text.replace("\\\n", " ").splitlines():
                    run(shlex.split(line), background)
    finally:
        background.stop()
    said = capsys.readouterr().out
    assert "6 prompts over" in said and "'items', 'mood', 'moods'" in said and "End(" in said


def run(words: list[str], background: Background) -> None:
    if words[:2] == ["incipit", "serve"]:
        background.start([*words[1:], "--device", "cpu", "--quiet"])
    elif words[0] == "incipit":
        with pytest.raises(SystemExit) as ended:
            main(words[1:])
        assert not ended.value.code, words
    else:
        assert words[0] == "curl", words
        words = [word.replace("http://127.0.0.1:8000", background.url) for word in words]
        if shutil.which("curl"):
            done = subprocess.run([*words, "--fail-with-body"], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout
            assert json.loads(done.stdout)["object"]


def test_every_option_is_explained_somewhere() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for option in (
        "--keys",
        "--admin-keys",
        "--rate",
        "--client",
        "--waiting",
        "--timeout",
        "--max-body",
        "--grace",
    ):
        assert f"`{option}`" in page or f" {option} " in page
