"""incipit: soft prompts for frozen language models.

Public names resolve on first use, so `import incipit` costs no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it
_HOME = {
    "ArtifactError": "incipit.errors",
    "BackboneError": "incipit.errors",
    "DataError": "incipit.errors",
    "IncipitError": "incipit.errors",
    "InteropError": "incipit.errors",
    "Interrupted": "incipit.errors",
    "PromptError": "incipit.errors",
    "RecipeError": "incipit.errors",
    "StorageError": "incipit.errors",
    "TrainingError": "incipit.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'incipit' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the second use does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
