"""The same tiny model twice: behind a Backbone here, and bare for PEFT."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from incipit.backbones import Backbone, tiny, wrap
from incipit.injection import Geometry
from incipit.prompts import InputPrompt


@pytest.fixture(scope="session")
def backbone_of() -> Callable[[str], Backbone]:
    made: dict[str, Backbone] = {}

    def backbone(name: str) -> Backbone:
        if name not in made:
            made[name] = wrap(name, *tiny.build(name))
        return made[name]

    return backbone


@pytest.fixture
def numbers() -> Callable[..., Tensor]:
    """Seeded rows, of the size of the tiny embeddings or larger."""

    def draw(*shape: int, scale: float = 0.5, seed: int = 3) -> Tensor:
        return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture
def soft(numbers: Callable[..., Tensor]) -> Callable[[Geometry, int], InputPrompt]:
    def prompt(geometry: Geometry, length: int) -> InputPrompt:
        return InputPrompt(geometry, length, numbers(length, geometry.hidden))

    return prompt
