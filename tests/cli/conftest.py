"""`incipit` called in this process, and one small run that the tests of the verbs share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from incipit.backbones import tiny
from incipit.cli import main


@dataclass(frozen=True)
class Done:
    """How a call ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


Call = Callable[..., Done]


def exit_code(arguments: Sequence[object]) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code if isinstance(caught.value.code, int) else 0


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> Done:
        capsys.readouterr()
        code = exit_code(arguments)
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run


RECIPE = """
name = "{name}"
[backbone]
name = "{backbone}"
device = "cpu"
[prompt]
length = {length}
[task]
builtin = "{task}"
limit = 6
[train]
steps = 2
batch = 2
[decode]
max_new_tokens = 2
"""


@dataclass(frozen=True)
class Run:
    """Two prompts of one backbone, tuned together. shop: reviews, 4 rows. desk: questions, 8 rows."""

    folder: Path
    backbone: Path
    shop: Path
    desk: Path


def write_recipe(path: Path, backbone: Path, task: str = "reviews", length: int = 4) -> Path:
    text = RECIPE.format(name=path.stem, backbone=backbone, task=task, length=length)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("tuned")
    tiny.save("llama", folder / "llama")
    shop = write_recipe(folder / "shop.toml", folder / "llama")
    desk = write_recipe(folder / "desk.toml", folder / "llama", "questions", 8)
    code = exit_code(
        ["tune", shop, desk, "--folder", folder / "runs", "--quiet", "--json", folder / "tuned.json"]
    )
    assert code == 0
    return Run(folder, folder / "llama", folder / "runs" / "shop", folder / "runs" / "desk")
