"""Every python and bash block of README and docs runs, page by page, on random backbones and for a few steps.

A block with a title ("toml title=...") is written to that file. A bash block holds `incipit` lines only. What stands
in a text block right after a python or bash block is what it prints, up to its numbers and label words.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from incipit import artifact
from incipit.assemble import PromptChoice, make_prompt
from incipit.backbones import tiny, wrap
from incipit.cli import main
from incipit.prompts import PROMPTS
from incipit.recipe import Recipe
from incipit.run import text_form
from incipit.tasks.metrics import DEFAULTS, MEAN, METRICS
from incipit.tasks.spec import TaskSpec
from incipit.tasks.task import builtin

ROOT = Path(__file__).parents[2]
OTHERS = {
    "docs/cli.md",
    "docs/interop.md",
    "docs/serving.md",
}  # a generated page, and two with tests of their own
PAGES = [
    path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
]
BLOCK = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.M | re.S)
# What pages call by a real name, and what stands in for it here.
STANDINS = {
    "google/t5-small-lm-adapt": "t5",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "llama",
    "HuggingFaceTB/SmolLM2-135M": "llama",
    "builtin:minilm": "bert",
    "builtin:t5": "t5",
    "builtin:lm": "llama",
}
FEW = ["train.steps=2", "train.batch=2", "train.eval_every=1"]


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    text: str
    prints: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = list(BLOCK.finditer(text))
    for match, after in zip(found, [*found[1:], None], strict=False):
        close = after is not None and after[1] == "text" and not text[match.end() : after.start()].strip()
        line = text[: match.start()].count("\n") + 2
        yield Block(match[1], match[2] or "", match[3], after[3] if close and after else "", line)


def run_lines(text: str, where: str) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "incipit", (
            f"{where}: a bash block holds incipit lines only; use a plain fence for {line!r}"
        )
        with pytest.raises(SystemExit) as ended:
            main(words[1:])
        assert not ended.value.code, f"{where}: {line!r} ended with {ended.value.code}"


def shape(text: str) -> str:
    """Numbers as #; a word that stands alone before or after a number is kept."""
    return re.sub(r"\d+(?:\.\d+)?(?:e-?\d+)?", "#", text)


@pytest.mark.parametrize("page", [p for p in PAGES if p not in OTHERS])
def test_a_page(
    page: str, shelf: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = Recipe.of.__func__  # type: ignore[attr-defined]

    def few(cls, table, overrides=(), *rest, **more):  # type: ignore[no-untyped-def]
        fewer = [*overrides, *(FEW if "task" in table else [])]
        if "task" in table and "builtin" in table["task"]:
            fewer.append("task.limit=8")
        return read(cls, table, fewer, *rest, **more)

    monkeypatch.setattr(Recipe, "of", classmethod(few))
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        where, text = f"{page}:{block.line}", block.text
        for real, standin in STANDINS.items():
            text = text.replace(real, str(shelf / standin))
        capsys.readouterr()
        if block.title:
            path = here / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + text, page, "exec"), names)
        elif block.language == "bash":
            run_lines(text, where)
        else:
            continue
        if block.prints:
            printed = capsys.readouterr().out
            there, told = (shape(t).split() for t in (printed, block.prints))
            assert len(there) == len(told), f"{where} printed\n{printed}"


def test_toml_blocks_without_a_title_are_recipes_or_tasks() -> None:
    import tomllib

    read = 0
    for page in PAGES:
        for block in blocks(page):
            if block.language == "toml" and not block.title:
                Recipe.of({"task": {"builtin": "reviews"}} | tomllib.loads(block.text), source=page)
                read += 1
    assert read >= 10


def test_the_pages_of_formats_name_every_key(tmp_path: Path) -> None:
    data, card = ((ROOT / "docs" / f"{n}.md").read_text(encoding="utf-8") for n in ("data", "artifact"))
    assert not [key for key in TaskSpec.__dataclass_fields__ if f"`{key}`" not in data]
    backbone = wrap("bert", *tiny.build("bert"))
    prompt = make_prompt(PromptChoice(length=2), backbone, ["red", "blue"])
    assert prompt is not None
    artifact.save(
        tmp_path / "a", prompt=prompt, backbone=backbone, name="a", task=text_form(builtin("reviews"))
    )
    found = artifact.load(tmp_path / "a").card
    keys = {*found, *found["backbone"], *found["backbone"]["fingerprint"], *found["task"], *found["prompt"]}
    assert not [key for key in keys if f"`{key}`" not in card]


def test_every_page_is_on_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    below = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")} - {"index.md"}
    assert below and not [page for page in below if f"]({page})" not in index]


def test_the_page_of_data_names_the_metrics_of_every_kind() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    told = page.split("## Metrics\n", 1)[1].split("\n## ", 1)[0]
    rows = {kind: rest for kind, *rest in re.findall(r"^\| (\w+) \| (.*?) \| ?(.*?) ?\|$", told, re.M)}
    assert {kind: tuple(re.findall(r"`(\w+)`", rows[kind][0])) for kind in DEFAULTS} == DEFAULTS
    for kind in DEFAULTS:
        named = set(re.findall(r"`(\w+)`", "".join(rows[kind])))
        fitting = {name for name, metric in METRICS.items() if kind in metric.kinds}
        assert named | {"accuracy", "exact_match", "perplexity", MEAN} == fitting


def test_every_way_to_make_a_prompt_is_on_a_page() -> None:
    pages = "".join((ROOT / p).read_text(encoding="utf-8") for p in PAGES if p.startswith("docs/methods/"))
    known = [PROMPTS[kind].__name__ for kind in PROMPTS]
    assert not [name for name in known if f"`{name}`" not in pages]


def test_the_reader_of_blocks() -> None:
    assert "builtin:minilm" in STANDINS and "README.md" in PAGES and "docs/index.md" in PAGES
    assert shape("test 0.75, 12 rows") == "test #, # rows"
