"""incipit: soft prompts for frozen language models.

Public names resolve on first use, so `import incipit` costs no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it
_HOME = {
    "Artifact": "incipit.artifact",
    "ArtifactError": "incipit.errors",
    "BackboneError": "incipit.errors",
    "Batch": "incipit.batch",
    "DataError": "incipit.errors",
    "DecodeOptions": "incipit.evaluation",
    "Ensemble": "incipit.ensemble",
    "Framed": "incipit.prompts",
    "GenerateOptions": "incipit.backbones",
    "Geometry": "incipit.injection",
    "IncipitError": "incipit.errors",
    "Injection": "incipit.injection",
    "InputPrompt": "incipit.prompts",
    "InteropError": "incipit.errors",
    "Interrupted": "incipit.errors",
    "Isolated": "incipit.prompts",
    "Masked": "incipit.prompts",
    "MultitaskPrompt": "incipit.prompts",
    "PrefixPrompt": "incipit.prompts",
    "PromptChoice": "incipit.assemble",
    "PromptError": "incipit.errors",
    "Reading": "incipit.prompts",
    "Recipe": "incipit.recipe",
    "RecipeError": "incipit.errors",
    "Reparametrised": "incipit.prompts",
    "StorageError": "incipit.errors",
    "Task": "incipit.tasks.task",
    "TaskSpec": "incipit.tasks.spec",
    "TrainingError": "incipit.errors",
    "evaluate": "incipit.evaluation",
    "make_prompt": "incipit.assemble",
    "predict": "incipit.decode",
    "prune": "incipit.run",
    "sweep": "incipit.run",
    "tune": "incipit.run",
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
