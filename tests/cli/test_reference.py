"""docs/cli.md is what the code says."""

import re
from pathlib import Path

import pytest
import typer

from incipit.cli import VERBS, app, reference
from incipit.recipe import Recipe
from incipit.tasks.spec import TaskSpec

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference.text(), "run: python -m incipit.cli.reference"


def test_it_names_everything_and_leaves_nothing_unsaid() -> None:
    page = reference.text()
    for verb in VERBS:
        assert f"## incipit {verb}\n" in page
    for key in (*TaskSpec.__dataclass_fields__, "lr_absolute", "trust_code", "max_new_tokens"):
        assert f"| `{key}` |" in page
    assert "|  |\n" not in page


@pytest.mark.parametrize("verb", VERBS)
def test_it_names_the_options_that_a_verb_takes(verb: str) -> None:
    (section,) = re.findall(rf"^## incipit {verb}\n(.*?)(?=^## )", reference.text(), re.M | re.S)
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    takes = {name for option in command.params for name in option.opts if name.startswith("--")}
    assert set(re.findall(r"^\| `(--[\w-]+)", section, re.M)) == takes


def test_its_example_is_a_recipe() -> None:
    assert Recipe.of(reference.EXAMPLE).prompt.length == 8
