"""docs/cli.md is what the code says."""

from pathlib import Path

from incipit.cli import VERBS, reference
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


def test_its_example_is_a_recipe() -> None:
    assert Recipe.of(reference.EXAMPLE).prompt.length == 8
