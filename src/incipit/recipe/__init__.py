"""Recipe (recipe.py), its tables (tables.py), what is wrong with it (problems.py, clashes.py)."""

from incipit.recipe.problems import settings_of
from incipit.recipe.prunes import PruneTable
from incipit.recipe.recipe import Recipe
from incipit.recipe.tables import (
    BackboneTable,
    DecodeTable,
    EnsembleTable,
    MixtureTable,
    PromptTable,
    TrainTable,
    TransferTable,
)

__all__ = [
    "BackboneTable",
    "DecodeTable",
    "EnsembleTable",
    "MixtureTable",
    "PromptTable",
    "PruneTable",
    "Recipe",
    "TrainTable",
    "TransferTable",
    "settings_of",
]
