"""Three prompts of one tiny backbone a family, untrained, and inputs for them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from incipit import artifact
from incipit.artifact import Artifact
from incipit.assemble import PromptChoice, make_prompt
from incipit.backbones import Backbone, tiny, wrap
from incipit.prompts import Prompt
from incipit.tasks.example import Example

WORDS = ("good", "bad", "neutral")
FORM = {
    "name": "mood",
    "kind": "classification",
    "input": "{text}",
    "words": list(WORDS),
    "metrics": ["accuracy"],
}
TEXTS = ("a fine film", "dull", "it was the best of times", "no", "red and green and blue", "so so")


@pytest.fixture(scope="session")
def backbones() -> Callable[[str], Backbone]:
    made: dict[str, Backbone] = {}

    def of(family: str) -> Backbone:
        if family not in made:
            made[family] = wrap(family, *tiny.build(family))
        return made[family]

    return of


def made_prompt(backbone: Backbone, seed: int, length: int = 4, words: tuple[str, ...] = WORDS) -> Prompt:
    prompt = make_prompt(PromptChoice(length=length, start="vocabulary"), backbone, words, seed)
    assert prompt is not None
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prompt.parameters():
            noise = torch.randn(parameter.shape, generator=source)
            parameter.add_(2 * backbone.geometry.embedding_rms * noise)
    return prompt


def examples(words: tuple[str, ...] = WORDS) -> list[Example]:
    return [
        Example(text, words[i % len(words)], words, i % len(words)) if words else Example(text, "yes")
        for i, text in enumerate(TEXTS)
    ]


Shelf = Callable[..., list[Artifact]]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """Artifacts a, b, c, ... of these prompts below tmp_path."""

    def put(backbone: Backbone, prompts: list[Prompt], form: dict[str, object] = FORM) -> list[Artifact]:
        found = []
        for name, prompt in zip("abcdef", prompts, strict=False):
            place = artifact.save(tmp_path / name, prompt=prompt, backbone=backbone, name=name, task=form)
            found.append(artifact.load(place))
        return found

    return put
